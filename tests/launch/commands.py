"""Commands that tests of launch.pod give, and how their answers are read."""

import json

ZONE = "--zone=us-central2-b"
UP = (
    "--name=run",
    "--project=my-project",
    "--accelerator=v4-16",
    ZONE,
    "--spot",
    "--allow_dirty",
    "--poll_seconds=0.1",
)
RUN = ("--name=run", "--", "--config=configs/stdlib.py", "--workdir=gs://bucket/run")
WATCH = ("--name=run", "--poll_seconds=0.1")


def error_of(laptop, command, *flags) -> str:
    """The one line of a command that must fail."""
    code, out, err = laptop.pod(command, *flags)
    assert code == 1, out + err
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


def status_of(laptop) -> dict:
    return json.loads((laptop.cloud.folder / "buckets/bucket/run/status.json").read_text())


def commands_of(out) -> list[str]:
    """What a dry run prints that gcloud would be called with."""
    return [line for line in out.splitlines() if line.startswith("gcloud")]


def on_machine(laptop, command) -> str:
    """What the first machine says."""
    return laptop.pod("ssh", "--name=run", "--", "bash", "-c", command)[1]


def error_of_many(laptop, command, *flags) -> str:
    code, out, err = laptop.pod(command, *flags)
    assert code == 1, out + err
    return err.splitlines()[-1]
