"""launch.pod up: slices that are asked for, there already, somebody else's, or not ready."""

import json
import shlex

import pytest

from launch import slices
from launch.gcloud import Gcloud
from launch.machines import Machines
from launch.record import Records
from tests.launch.commands import RUN, UP, WATCH, commands_of, error_of, error_of_many
from tvq_pod.errors import UserError
from tvq_pod.run import packages


@pytest.mark.slow(1)
def test_a_dry_run_comes_before_up_too(laptop):
    """With the flags that `up` will have, the commands are those that will be run; without, what is missing is said."""
    planned = commands_of(laptop.must("run", "--dry_run", *UP, *RUN[1:]))
    assert not laptop.get("log")
    assert not (laptop.folder / "records").exists()
    laptop.must("up", *UP)
    before = len(laptop.get("log"))
    laptop.must("run", *RUN)
    done = [shlex.join(["gcloud", *arguments]) for arguments in laptop.get("log")[before:]]
    (record,) = (json.loads(path.read_text()) for path in (laptop.folder / "records").glob("*.json"))
    start = next(line for line in planned if "worker.sh start" in line)
    run_id = start.partition("worker.sh start ")[2].partition("-")[0]
    planned = [line.replace(run_id, record["run_id"]) for line in planned]
    assert planned == [line for line in done if "describe" not in line and "worker.sh state" not in line]


def test_a_dry_run_before_up_says_what_is_missing(laptop):
    watch = laptop.must("watch", "--name=run", "--dry_run")
    assert watch.startswith("# run does not exist yet: `up` comes first\n")
    assert "--accelerator-type=ACCELERATOR" in watch
    assert "worker.sh start RUN_ID-1 gs://BUCKET/RUN/logs" in watch
    assert "worker.sh install tvq_pod-" in watch
    for command, flags in dict(
        run=RUN, watch=WATCH, stop=WATCH[:1], down=WATCH[:1], logs=WATCH[:1], ssh=RUN[:1]
    ).items():
        assert commands_of(laptop.must(command, "--dry_run", *flags))
    laptop.must("status", "--dry_run", "--name=run")
    assert not laptop.get("log")
    assert not (laptop.folder / "records").exists()
    assert "does not exist in" in error_of(laptop, "watch", "--name=run")


@pytest.mark.slow
def test_up_prints_the_versions_and_says_if_machines_differ(laptop):
    here = packages.summary(packages.installed())
    lines = laptop.must("up", *UP).splitlines()
    assert lines.count(f"run: {here}") == 1
    assert f"jax {packages.installed()['jax']}, " in here
    laptop.set(versions={"run/1": "python 3.12.9, jax 0.10.2"})
    assert lines.count(f"run: {here}") == laptop.must("up", *UP).splitlines().count(f"run: {here}")  # not asked again
    for worker in (0, 1):
        (laptop.cloud.machine("run", worker) / "home/tvq_pod/installed").unlink()
    lines = laptop.must("up", *UP).splitlines()
    assert "run: WARNING: machines differ: 1 of them (run/1) have python 3.12.9, jax 0.10.2" in lines
    assert f"run: WARNING: machines differ: 1 of them (run/0) have {here}" in lines


def test_a_quota_that_is_used_up_is_said_and_the_same_command_goes_on_later(laptop):
    laptop.set(create_errors=[["RESOURCE_EXHAUSTED", "Quota limit 'TPUV4' has been exceeded. Limit: 0 in region r."]])
    said = error_of(laptop, "up", *UP)
    assert "Quota limit 'TPUV4' has been exceeded" in said
    assert "ask for more" in said
    laptop.must("up", *UP)
    assert laptop.get("queued")["run"]["state"] == "ACTIVE"


@pytest.mark.slow(1)
def test_a_slice_that_is_there_already_is_used(laptop):
    laptop.must("up", *UP)
    asked = laptop.get("queued")["run"]["asked_at"]
    laptop.must("up", *UP)
    laptop.must("up", "--name=run", "--poll_seconds=0.1", "--allow_dirty")
    assert laptop.get("queued")["run"]["asked_at"] == asked
    assert "--accelerator: the run run was requested with v4-16" in error_of(
        laptop, "up", "--name=run", "--accelerator=v4-8", "--allow_dirty"
    )


@pytest.mark.slow
def test_a_name_that_somebody_else_has_is_left_alone(laptop):
    laptop.must("up", *UP)
    theirs = laptop.folder / "records"
    theirs.rename(laptop.folder / "other")
    assert "is taken by a queued resource that this machine did not request" in error_of(laptop, "up", *UP)
    theirs.joinpath("run.json").write_text(
        (laptop.folder / "other/run.json").read_text().replace('"label": "', '"label": "0')
    )
    for command, flags in (("run", RUN), ("watch", WATCH), ("down", (*WATCH[:1], "--yes"))):
        code, _, err = laptop.pod(command, *flags)
        assert code == 1
        assert "is taken by" in err or "nothing to watch" in err
    assert laptop.get("queued")["run"]["state"] == "ACTIVE"


@pytest.mark.slow
def test_machines_that_fail_to_install_are_named_and_the_same_command_mends_it(laptop):
    laptop.set(broken=["run/1"])
    said = error_of_many(laptop, "up", *UP)
    assert "1 of 2 machine(s) failed: run/1: " in said
    assert "No space left on device" in said
    assert "of disk free" in said
    laptop.set(broken=[])
    laptop.must("up", *UP)


@pytest.mark.slow(2)
def test_pip_on_the_machines_finds_the_environment_of_the_install_and_the_training_does_not(laptop, tmp_path):
    (tmp_path / "pip").write_text("PIP_INDEX_URL=https://me:a b@index/simple\nHTTPS_PROXY=http://proxy:1\n")
    (tmp_path / "keys").write_text("SECRET=x\n")
    assert "gone: cannot be read" in error_of(laptop, "up", *UP, f"--install_env_file={tmp_path / 'gone'}")
    laptop.must("up", *UP, f"--install_env_file={tmp_path / 'pip'}")
    index = dict(PIP_INDEX_URL="https://me:a b@index/simple", HTTPS_PROXY="http://proxy:1", SECRET=None)
    assert laptop.get("pip") == index
    assert "me:a b" not in json.dumps(laptop.get("log"))
    machine = laptop.cloud.machine("run", 0) / "home/tvq_pod"
    assert (machine / "install_env").stat().st_mode & 0o777 == 0o600
    laptop.must("run", f"--env_file={tmp_path / 'keys'}", *RUN)
    assert "HTTPS_PROXY" not in (machine / "env").read_text() + (machine / "run.sh").read_text()
    laptop.must("stop", "--name=run")
    laptop.set(pip={})
    (machine / "installed").unlink()
    laptop.must("up", *UP)  # it is remembered, as watch needs it for a new slice
    assert laptop.get("pip") == index


@pytest.mark.slow
def test_ssh_that_drops_is_tried_again(laptop):
    laptop.set(ssh_failures=2)
    said = laptop.must("up", *UP)
    assert said.count("trying again") >= 1
    laptop.set(ssh_failures=9)
    # A machine that does not answer may be training.
    assert "only 0 of 2 machine(s) answered; try again" in error_of(laptop, "run", *RUN)
    laptop.set(ssh_failures=0)
    laptop.must("run", *RUN)


def test_a_request_that_somebody_else_made_at_the_same_time_is_theirs(laptop, monkeypatch):
    """Between the question whether there is one and the request."""
    laptop.must("up", *UP)
    for name in ("PATH", "STANDIN"):
        monkeypatch.setenv(name, laptop.environment[name])
    records = Records(laptop.folder / "records")
    record = records.get("run")
    record.label = "ours"
    records.save(record)
    with pytest.raises(UserError, match="is taken by a queued resource"):
        Machines(record, records, Gcloud(record.project, record.zone)).ask()


@pytest.mark.parametrize(("accelerator", "chips"), [("tpu7x-16", 8), ("v5litepod-16", 16), ("v5p-16", 8)])
def test_every_kind_is_requested_with_what_its_machines_boot(laptop, accelerator, chips):
    """tpu7x counts cores, two a chip, as v5p does."""
    boots = {"tpu7x-16": "v2-alpha-tpu7-ubuntu2404", "v5litepod-16": "v2-alpha-tpuv5-lite", "v5p-16": "v2-alpha-tpuv5"}
    flags = ("--name=run", "--zone=us-central1-c", f"--accelerator={accelerator}", "--allow_dirty", "--dry_run")
    shown = laptop.must("up", *flags)
    (create,) = [line for line in commands_of(shown) if " create " in line]
    assert f" --accelerator-type={accelerator} --runtime-version={boots[accelerator]} " in create
    assert slices.parse(accelerator).chips == chips
