"""launch.pod against a cloud of real processes: what a person types, from the first command to the last."""

import json
import shlex
import subprocess
import sys

import pytest

from launch import show
from tests.launch.commands import RUN, UP, WATCH, commands_of, error_of, error_of_many, on_machine, status_of
from tests.launch.conftest import ROOT, write_program


@pytest.mark.slow
def test_from_nothing_to_done_and_nothing_left(laptop):
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    assert "run: done" in laptop.must("watch", *WATCH)
    shown = laptop.must("status").splitlines()[1]
    assert shown.split()[:5] == ["run", "v4-16", "spot", "active", "done"]
    assert "20/20" in shown
    assert "75.0%" in shown
    head, *parts = laptop.must("status", "--name=run").splitlines()[2:]
    assert head == "goodput 75.0%: of 0:02:00 since the first start, 1 start"
    assert [part.split()[0] for part in parts] == ["steps", "waiting"]
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
    assert "does not exist; give 0 to 3" in error_of(laptop, "logs", "--name=run", "--worker=4")


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


def test_watch_can_be_planned_before_run(laptop):
    laptop.must("up", *UP)
    assert "worker.sh start RUN_ID-1 gs://BUCKET/RUN/logs" in laptop.must("watch", "--dry_run", *WATCH)
    assert "nothing to watch; start it with `run` first" in error_of(laptop, "watch", *WATCH)


def test_the_program_may_be_started_by_its_path(laptop):
    """No module in launch has the name of one of Python's own, which the ones beside it would import instead."""
    environment = {name: value for name, value in laptop.environment.items() if name != "PYTHONPATH"}
    program = [sys.executable, str(ROOT / "launch/pod.py"), "status", f"--records={laptop.folder / 'records'}"]
    done = subprocess.run(program, env=environment, cwd=laptop.folder, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("no runs")
    assert not {path.stem for path in (ROOT / "launch").glob("*.py")} & sys.stdlib_module_names


@pytest.mark.slow
def test_what_was_not_prepared_is_not_started_and_what_was_started_not_prepared(laptop):
    laptop.set(broken=["run/1"], wait_at=3)
    laptop.pod("up", *UP)
    assert "its machines are not prepared; run `up` first" in error_of(laptop, "run", *RUN)
    laptop.set(broken=[])
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    assert "is training; to install another commit, `stop` it first" in error_of(laptop, "up", *UP)
    machine = laptop.cloud.machine("run", 0)
    said = on_machine(laptop, "bash tvq_pod/worker.sh install tvq_pod-other")
    assert "tvq_pod@run/0: failed a training is running with tvq_pod-" in said
    assert (machine / "home/tvq_pod/venv/bin/python").exists()


@pytest.mark.slow
def test_a_service_that_did_not_start_is_started_by_the_next_call(laptop):
    laptop.must("up", *UP)
    systemctl = laptop.cloud.folder / "bin/systemctl"
    whole = systemctl.read_text()
    write_program(systemctl, f'[ "$1" != start ] || exit 1\n{whole}')
    assert "run/0: failed systemctl start: no reason given" in error_of_many(laptop, "run", "--poll_seconds=0.1", *RUN)
    systemctl.write_text(whole)
    assert "run: done" in laptop.must("watch", *WATCH)


@pytest.mark.slow
def test_stop_saves_and_watch_lets_it_be(laptop):
    laptop.set(wait_at=8)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    while "training (" not in laptop.must("status"):  # the heading has the word, too
        pass
    assert "is already training" in error_of(laptop, "run", *RUN)
    laptop.must("stop", "--name=run")
    assert status_of(laptop)["state"] == "preempted"
    assert "was stopped by hand" in laptop.must("watch", *WATCH)
    laptop.set(wait_at=0)
    laptop.cloud.preempt("run", grace=0.0)
    assert "its slice is SUSPENDED; run `up` first" in error_of(laptop, "run", *RUN)
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


@pytest.mark.slow(2)
def test_down_asks_and_saves_first(laptop):
    laptop.set(wait_at=3)
    laptop.must("up", *UP)
    laptop.must("run", *RUN)
    while "training (" not in laptop.must("status"):  # the heading has the word, too
        pass
    assert "--yes=False: there is no terminal to ask on; give --yes" in laptop.pod("down", "--name=run")[2]
    assert "it is asked to save first" in laptop.must("down", "--name=run", "--yes")
    assert status_of(laptop)["state"] == "preempted"
    assert "does not exist in" in error_of(laptop, "down", "--name=run")


@pytest.mark.parametrize("status", [None, {}, *(dict(goodput=x) for x in (None, [1], "x", {}, dict(seconds=3)))])
def test_a_status_file_that_does_not_say_where_the_time_went_has_no_table(status):
    assert show.goodput(status) == ""
