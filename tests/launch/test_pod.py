"""launch.pod against a cloud of real processes: what a person types, from the first command to the last."""

import io
import json
import pathlib
import shlex
import subprocess
import sys
import tarfile

import pytest

from launch.gcloud import Gcloud
from launch.machines import Machines
from launch.record import Records
from tests.launch.conftest import ROOT, write_program
from tvq_pod.errors import UserError
from tvq_pod.run import packages

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


@pytest.mark.slow
def test_from_nothing_to_done_and_nothing_left(laptop):
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    assert "run: done" in laptop.must("watch", *WATCH)
    shown = laptop.must("status").splitlines()[1]
    assert shown.split()[:5] == ["run", "v4-16", "spot", "active", "done"]
    assert "20/20" in shown
    assert "begins after step" in laptop.must("logs", "--name=run", "--worker=1")
    said = laptop.must("down", "--name=run", "--yes")
    assert "deletes 1 slice(s) v4-16, 2 machine(s) and their disks" in said
    assert "gs://bucket/run stays" in said
    assert laptop.get("queued") == {}
    assert not list((laptop.cloud.folder / "machines").iterdir())
    left = [path for path in (laptop.folder / "records").rglob("*") if path.is_file()]
    assert not left


@pytest.mark.slow
def test_several_slices_are_one_job(laptop):
    laptop.must("up", *UP, "--slices=2")
    laptop.must("run", *RUN)
    laptop.must("watch", *WATCH)
    where = sorted(name for name, _, _ in laptop.get("attempts"))
    assert where == ["run-0/0", "run-0/1", "run-1/0", "run-1/1"]
    assert all("--config.mesh.slices=2" in arguments for _, _, arguments in laptop.get("attempts"))
    assert "begins" in laptop.must("logs", "--name=run", "--worker=3")
    assert "must be 0 .. 3" in error_of(laptop, "logs", "--name=run", "--worker=4")


@pytest.mark.slow
def test_every_value_arrives_as_it_was_given(laptop, tmp_path):
    prompt = '--config.sample.prompt=it\'s $HOME `id`; "a"  b\\ *\n100%'
    secrets = tmp_path / "secrets"
    secrets.write_text("# a key\nSECRET=a%b $c 'd'\n")
    laptop.must("up", *UP)
    laptop.must("run", f"--env_file={secrets}", *RUN, prompt)
    laptop.must("watch", *WATCH)
    assert all(arguments[2] == prompt for _, _, arguments in laptop.get("attempts"))
    assert "with a%b $c 'd' secret" in laptop.must("logs", "--name=run")
    seen = json.dumps(laptop.get("log"))
    assert "a%b" not in seen  # of gcloud's arguments
    assert "id`" not in seen
    machine = laptop.cloud.machine("run", 0) / "home/tvq_pod"
    assert (machine / "env").stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_a_dry_run_prints_the_commands_and_does_nothing(laptop):
    planned = laptop.must("up", *UP, "--dry_run")
    assert not laptop.get("log")
    assert not (laptop.folder / "records").exists()
    laptop.must("up", *UP)
    done = [shlex.join(["gcloud", *arguments]) for arguments in laptop.get("log")]
    label = next(line for line in done if "--labels" in line).partition("--labels=tvq_pod=")[2].split()[0]
    lines = commands_of(planned)
    theirs = lines[1].partition("--labels=tvq_pod=")[2].split()[0]
    assert [line.replace(theirs, label) for line in lines] == done
    laptop.must("run", *RUN)
    before = len(laptop.get("log"))
    for command, flags in dict(
        run=RUN, watch=WATCH, stop=WATCH[:1], down=WATCH[:1], logs=WATCH[:1], ssh=RUN[:1]
    ).items():
        assert "gcloud compute tpus queued-resources" in laptop.must(command, "--dry_run", *flags)
    assert len(laptop.get("log")) == before


def commands_of(out) -> list[str]:
    """What a dry run prints that gcloud would be called with."""
    return [line for line in out.splitlines() if line.startswith("gcloud")]


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
    assert "no such run" in error_of(laptop, "watch", "--name=run")


def test_watch_can_be_planned_before_run(laptop):
    laptop.must("up", *UP)
    assert "worker.sh start RUN_ID-1 gs://BUCKET/RUN/logs" in laptop.must("watch", "--dry_run", *WATCH)
    assert "nothing to watch; `run` first" in error_of(laptop, "watch", *WATCH)


def test_a_config_that_the_machines_do_not_have_is_refused_before_anything_starts(laptop, tmp_path):
    laptop.must("up", *UP)
    (tmp_path / "mine.py").write_text("")
    calls, before = laptop.get("calls"), (laptop.folder / "records/run.json").read_text()
    for flags, message in {
        ("--config=configs/stdlb.py",): "--config=configs/stdlb.py: does not exist in tvq_pod-",
        ("--config", "nowhere/stdlib.py"): "did you mean configs/stdlib.py?",
        ("--config=configs/stdlib.py", "--config="): "--config=: does not exist in tvq_pod-",
        (f"--config={tmp_path}/mine.py",): f"--config={tmp_path}/mine.py: is not part of tvq_pod-",
        (f"--config={ROOT}/configs/stdlib.py",): "is a path of this machine; give --config=configs/stdlib.py",
        ("--config=gs://bucket/c.py",): "--config=gs://bucket/c.py: does not exist in tvq_pod-",
        ("--config=configs/stdlib.py", "--prompt_file=prompt.txt"): "--prompt_file=prompt.txt: does not exist in",
    }.items():
        assert message in error_of(laptop, "run", "--name=run", "--", "--workdir=gs://bucket/run", *flags)
    assert "does not exist in" in error_of(laptop, "run", "--name=run", "--dry_run", "--", *RUN[3:], "--config=c.py")
    assert laptop.get("calls") == calls
    assert (laptop.folder / "records/run.json").read_text() == before


def test_a_config_that_is_not_committed_is_refused_before_up_too(laptop, tmp_path):
    (tmp_path / "mine.py").write_text("")
    flags = ("--name=run", "--dry_run", "--", f"--config={tmp_path}/mine.py", "--workdir=gs://bucket/run")
    assert "is not part of tvq_pod-" in error_of(laptop, "run", *flags)


def test_a_config_is_the_same_however_its_path_is_written(laptop):
    for config in ("./configs//stdlib.py", "configs/stdlib.py:and its argument", "configs/../configs/stdlib.py"):
        laptop.must("run", "--name=run", "--dry_run", "--", f"--config={config}", "--workdir=gs://bucket/run")


def test_without_a_config_there_must_be_an_earlier_run(laptop):
    laptop.must("up", *UP)
    run = ("--name=run", "--", "--workdir=gs://bucket/run")
    assert "there is no gs://bucket/run/config.json of an earlier run" in error_of(laptop, "run", *run)
    assert laptop.get("attempts") is None
    (laptop.cloud.folder / "buckets/bucket/run").mkdir(parents=True)
    (laptop.cloud.folder / "buckets/bucket/run/config.json").write_text("{}")
    laptop.must("run", *run)


def test_a_config_on_a_mount_that_all_machines_share(laptop, tmp_path):
    laptop.must("up", *UP)
    flags = ("--name=run", "--shared_workdir", "--", f"--config={tmp_path}/c.py", f"--workdir={tmp_path}/run")
    assert f"--config={tmp_path}/c.py: does not exist on the machines" in error_of(laptop, "run", *flags)
    assert laptop.get("attempts") is None
    (tmp_path / "c.py").write_text("")
    laptop.must("run", *flags)


def test_a_config_that_was_changed_since_up_is_said(laptop):
    laptop.must("up", *UP)
    assert "WARNING" not in laptop.must("run", "--dry_run", *RUN)
    (path,) = (laptop.folder / "records/sources").glob("*.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo(f"{path.name.removesuffix('.tar.gz')}/configs/stdlib.py")
        tar.addfile(member, io.BytesIO())
    said = laptop.must("run", "--dry_run", *RUN)
    assert "WARNING: --config=configs/stdlib.py: differs here from tvq_pod-" in said


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


def test_the_program_may_be_started_by_its_path(laptop):
    """No module in launch has the name of one of Python's own, which the ones beside it would import instead."""
    environment = {name: value for name, value in laptop.environment.items() if name != "PYTHONPATH"}
    program = [sys.executable, str(ROOT / "launch/pod.py"), "status", f"--records={laptop.folder / 'records'}"]
    done = subprocess.run(program, env=environment, cwd=laptop.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split()[:2] == ["run", "slice"]
    assert not {path.stem for path in (ROOT / "launch").glob("*.py")} & sys.stdlib_module_names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--accelerator=v4-16",), "--name=: must be given"),
        (("--name=Run;rm", "--accelerator=v4-16"), "--name=Run;rm: must be 1 to 40 of a-z, 0-9 and -"),
        (("--name=run",), "--accelerator=: must be given"),
        (("--name=run", "--accelerator=h100-8"), "--accelerator=h100-8: must be one of v2, v3, v4, v5litepod"),
        (("--name=run", "--accelerator=tpu7x-8"), "--accelerator=tpu7x-8: must be one of v2"),
        (("--name=run", "--accelerator=v5p-7"), "--accelerator=v5p-7: behind v5p- must be a number of cores"),
        (("--name=run", "--accelerator=v4-16", "--zone=a b"), "--zone=a b: must look like us-west4-a"),
        (("--name=run", "--accelerator=v4-16", "--spot", "--reserved"), "--spot --reserved: must be one of them"),
        (("--name=run", "--accelerator=v4-16", "extra"), "extra: up takes flags only"),
    ],
)
def test_what_can_t_be_is_refused_before_gcloud_is_asked(laptop, flags, message):
    assert message in error_of(laptop, "up", *flags)
    assert not laptop.get("log")


def test_a_workdir_that_goes_with_the_machines_is_refused(laptop):
    laptop.must("up", *UP)
    calls = laptop.get("calls")
    assert "must be given behind --" in error_of(laptop, "run", "--name=run", "--", "--config=c.py")
    for workdir in ("runs/x", "/data/x"):
        said = error_of(laptop, "run", "--name=run", "--", f"--workdir={workdir}")
        assert f"--workdir={workdir}: is on the machines' own disks" in said
    assert "--multihost: must be left out" in error_of(laptop, "run", *RUN, "--multihost")
    assert laptop.get("calls") == calls


def test_gcloud_that_is_not_there_or_not_logged_in(laptop):
    laptop.set(logged_in=False)
    assert "You do not currently have an active account selected. (gcloud auth login)" in error_of(laptop, "up", *UP)
    (laptop.bin / "gcloud").unlink()
    laptop.environment["PATH"] = f"{laptop.bin}:{path_without_gcloud(laptop)}"
    assert "gcloud: is not on the PATH; install it" in error_of(laptop, "up", *UP)


def path_without_gcloud(laptop) -> str:
    folder = laptop.folder / "only-git"
    folder.mkdir()
    write_program(folder / "git", 'exec /usr/bin/env -i PATH=/usr/bin:/bin git "$@"')
    return str(folder)


def test_a_quota_that_is_used_up_is_said_and_the_same_command_goes_on_later(laptop):
    laptop.set(create_errors=[["RESOURCE_EXHAUSTED", "Quota limit 'TPUV4' has been exceeded. Limit: 0 in region r."]])
    said = error_of(laptop, "up", *UP)
    assert "Quota limit 'TPUV4' has been exceeded" in said
    assert "ask for more" in said
    laptop.must("up", *UP)
    assert laptop.get("queued")["run"]["state"] == "ACTIVE"


def test_a_slice_that_is_there_already_is_used(laptop):
    laptop.must("up", *UP)
    asked = laptop.get("queued")["run"]["asked_at"]
    laptop.must("up", *UP)
    laptop.must("up", "--name=run", "--poll_seconds=0.1", "--allow_dirty")
    assert laptop.get("queued")["run"]["asked_at"] == asked
    assert "--accelerator: the run run was asked for with v4-16" in error_of(
        laptop, "up", "--name=run", "--accelerator=v4-8", "--allow_dirty"
    )


@pytest.mark.slow
def test_a_name_that_somebody_else_has_is_left_alone(laptop):
    laptop.must("up", *UP)
    theirs = laptop.folder / "records"
    theirs.rename(laptop.folder / "other")
    assert "is taken by a queued resource that this machine did not ask for" in error_of(laptop, "up", *UP)
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


def error_of_many(laptop, command, *flags) -> str:
    code, out, err = laptop.pod(command, *flags)
    assert code == 1, out + err
    return err.splitlines()[-1]


@pytest.mark.slow
def test_ssh_that_drops_is_tried_again(laptop):
    laptop.set(ssh_failures=2)
    said = laptop.must("up", *UP)
    assert said.count("tries again") >= 1
    laptop.set(ssh_failures=9)
    # A machine that does not answer may be training.
    assert "only 0 of 2 machine(s) answered; try again" in error_of(laptop, "run", *RUN)
    laptop.set(ssh_failures=0)
    laptop.must("run", *RUN)


@pytest.mark.slow
def test_what_was_not_prepared_is_not_started_and_what_was_started_not_prepared(laptop):
    laptop.set(broken=["run/1"], wait_at=3)
    laptop.pod("up", *UP)
    assert "its machines are not prepared; `up` first" in error_of(laptop, "run", *RUN)
    laptop.set(broken=[])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    assert "has been started; to install another commit, `stop` first" in error_of(laptop, "up", *UP)
    machine = laptop.cloud.machine("run", 0)
    said = on_machine(laptop, "bash tvq_pod/worker.sh install tvq_pod-other")
    assert "tvq_pod@run/0: failed a training runs with tvq_pod-" in said
    assert (machine / "home/tvq_pod/venv/bin/python").exists()


def on_machine(laptop, command) -> str:
    """What the first machine says."""
    return laptop.pod("ssh", "--name=run", "--", "bash", "-c", command)[1]


@pytest.mark.slow
def test_a_service_that_did_not_start_is_started_by_the_next_call(laptop):
    laptop.must("up", *UP)
    systemctl = laptop.cloud.folder / "bin/systemctl"
    whole = systemctl.read_text()
    write_program(systemctl, f'[ "$1" != start ] || exit 1\n{whole}')
    assert "run/0: failed systemctl start: no reason given" in error_of_many(laptop, "run", "--poll_seconds=0.1", *RUN)
    systemctl.write_text(whole)
    assert "run: done" in laptop.must("watch", *WATCH)


@pytest.mark.parametrize("text", [None, "no setting", "A B=c"])
def test_an_env_file_that_is_none_is_refused_before_anything_changes(laptop, tmp_path, text):
    laptop.must("up", *UP)
    if text is not None:
        (tmp_path / "env").write_text(text)
    before = (laptop.folder / "records/run.json").read_text()
    said = error_of(laptop, "run", f"--env_file={tmp_path / 'env'}", *RUN)
    assert "can't be read" in said if text is None else "must have lines NAME=VALUE" in said
    assert (laptop.folder / "records/run.json").read_text() == before


@pytest.mark.slow
def test_stop_saves_and_watch_lets_it_be(laptop):
    laptop.set(wait_at=8)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    while "training" not in laptop.must("status"):
        pass
    assert "trains already" in error_of(laptop, "run", *RUN)
    laptop.must("stop", "--name=run")
    assert status_of(laptop)["state"] == "preempted"
    assert "was stopped by hand" in laptop.must("watch", *WATCH)
    laptop.set(wait_at=0)
    laptop.cloud.preempt("run", grace=0.0)
    assert "its slice is SUSPENDED; `up` first" in error_of(laptop, "run", *RUN)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    laptop.must("watch", *WATCH)
    assert status_of(laptop)["state"] == "done"


@pytest.mark.slow
def test_what_an_earlier_run_left_in_the_workdir_is_not_taken_for_this_one_s(laptop):
    laptop.set(wait_at=1)  # before it writes a status of its own
    path = laptop.cloud.folder / "buckets/bucket/run/status.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(state="done", run_id="another", saved_step=0, step=0, num_steps=20)))
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    watch = laptop.start("watch", *WATCH)
    said = watch.stdout.readline()
    assert "done" not in said
    laptop.set(wait_at=0)
    said += watch.communicate(timeout=60)[0]
    assert watch.returncode == 0
    assert "run: done" in said.splitlines()[-1]
    assert status_of(laptop)["step"] == 20


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


def test_down_asks_and_saves_first(laptop):
    laptop.set(wait_at=3)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    while "training" not in laptop.must("status"):
        pass
    assert "--yes: must be given where nobody can be asked" in laptop.pod("down", "--name=run")[2]
    assert "it is asked to save first" in laptop.must("down", "--name=run", "--yes")
    assert status_of(laptop)["state"] == "preempted"
    assert "no such run" in error_of(laptop, "down", "--name=run")


def test_what_is_not_committed_is_refused_or_named_by_its_hash(tmp_path):
    from launch import source

    clone = tmp_path / "clone"
    source._git("clone", "--quiet", "--shared", str(source.ROOT), str(clone))
    root, source.ROOT = source.ROOT, clone
    try:
        clean = source.pack(tmp_path, allow_dirty=False)
        (clone / "secret.key").write_text("not tracked")
        assert source.pack(tmp_path, allow_dirty=False) == clean
        (clone / "README.md").write_text("changed")
        with pytest.raises(UserError, match=r"--allow_dirty=False: 1 file\(s\) differ .*README.md"):
            source.pack(tmp_path, allow_dirty=False)
        dirty = source.pack(tmp_path, allow_dirty=True)
        assert dirty.startswith(f"{clean}-dirty-")
        (clone / "README.md").write_text("changed again")
        assert source.pack(tmp_path, allow_dirty=True) != dirty
    finally:
        source.ROOT = root
    assert archived(tmp_path / f"{dirty}.tar.gz", "README.md") == b"changed"
    assert archived(tmp_path / f"{dirty}.tar.gz", "secret.key") is None


def archived(path: pathlib.Path, name: str) -> bytes | None:
    with tarfile.open(path) as tar:
        found = [member for member in tar.getmembers() if member.name.endswith(f"/{name}")]
        return tar.extractfile(found[0]).read() if found else None
