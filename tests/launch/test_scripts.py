"""What is not python: the shell scripts, the Slurm script, the JobSet, and the flags of gcloud that all of them use."""

import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models

from launch import libtpu, slices
from launch.record import Record, Records
from tests import forked
from tests.launch.commands import status_of
from tests.launch.conftest import ROOT, write_program
from tests.launch.gcloud_program import TABLE
from tvq_pod.planning.chips import CHIPS

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
RESTART_ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    program = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_jobset_is_what_kubernetes_and_jobset_say_it_may_be():
    """JobSet's published models drop what they don't know; the Job in it goes through Kubernetes' own strict schema."""
    manifest = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())
    check_jobset(manifest)
    for path, value in (
        (("spec", "failurePolicy", "maxRestart"), 3),
        (("spec", "replicatedJobs", 0, "template", "spec", "paralelism"), 4),
        (("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "containers", 0, "arg"), []),
        (("spec", "failurePolicy", "rules", 0, "action"), "Restart"),
    ):
        wrong = json.loads(json.dumps(manifest))
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
            check_jobset(wrong)


def check_jobset(manifest: dict) -> None:
    known = models.JobsetV1alpha2JobSet.from_dict(manifest)
    assert known
    assert known.to_dict() == manifest
    assert manifest["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
    assert all(rule["action"] in RESTART_ACTIONS for rule in manifest["spec"]["failurePolicy"]["rules"])
    for replicated in manifest["spec"]["replicatedJobs"]:
        job = dict(apiVersion="batch/v1", kind="Job", metadata=dict(name="job"), spec=replicated["template"]["spec"])
        kubernetes_validate.validate(job, "1.34", strict=True)


@pytest.mark.slow(2)
def test_the_shell_only_path_has_a_training_done(laptop):
    environment = laptop.environment | dict(NAME="run", ZONE="us-central2-b", ACCELERATOR="v4-16", POLL_SECONDS="0.1")
    environment |= dict(CREATE_FLAGS="--spot --network=default", ALLOW_DIRTY="1")

    def shell(*arguments) -> str:
        command = ["bash", str(ROOT / "launch/tpu_vm.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert shell("up").count("installed tvq_pod-") == 2
    laptop.set(environment=laptop.get("environment") | dict(TVQ_POD_RUN_ID=""))
    shell("run", "--config=a b.py", "--workdir=gs://bucket/run")
    deadline = time.monotonic() + 60
    while shell("state").count(": exited ") < 2:
        assert time.monotonic() < deadline
    assert status_of(laptop)["state"] == "done"
    assert laptop.get("attempts")[0][2][:2] == ["--multihost", "--config=a b.py"]
    assert "begins after step 0" in shell("logs")
    shell("stop")
    shell("down")
    assert laptop.get("queued") == {}


class Slurm:
    """launch/slurm.sh as a running job 7. As with Slurm, srun passes SIGUSR1 on to its task and kills it at SIGTERM,
    and scancel reaches the task alone. The task logs its saves, and ends with the code in the file `code`, or after
    SIGTERM with 75. `sleep` lasts until the file `late` exists."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        log = f">> {folder}/log"
        until = "do /bin/sleep 0.02; done"
        task = (
            f"trap 'echo saved {log}' USR1; trap 'exit 75' TERM; echo $$ > {folder}/pid.writing; "
            f"mv {folder}/pid.writing {folder}/task; while ! [ -e {folder}/code ]; {until}; exit $(cat {folder}/code)"
        )
        write_program(folder / "task_program", task)
        srun = (
            f"trap 'kill -USR1 $!' USR1; trap 'kill -KILL $!' TERM; echo \"srun $*\" {log}; {folder}/task_program & "
            "while kill -0 $! 2> /dev/null; do wait $!; code=$?; done; exit $code"
        )
        write_program(folder / "srun", srun)
        write_program(folder / "scancel", f'echo "scancel $*" {log}; kill -TERM $(cat {folder}/task)')
        write_program(folder / "scontrol", f'echo "scontrol $*" {log}; ! [ -e {folder}/full ]')
        write_program(folder / "sleep", f'echo "sleep $*" {log}; while ! [ -e {folder}/late ]; {until}')
        self.job = subprocess.Popen(
            ["bash", ROOT / "launch/slurm.sh", "--config=c.py", "--workdir=/shared/a b"],
            env=dict(PATH=f"{folder}:/usr/bin:/bin", SLURM_JOB_ID="7"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.wait_for(lambda: (folder / "task").exists())
        self.task = int((folder / "task").read_text())

    def wait_for(self, true) -> None:
        deadline = time.monotonic() + 20
        while not true():
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.01)

    def log(self) -> list[str]:
        """What was called, and what the task did."""
        return (self.folder / "log").read_text().splitlines()

    def end(self) -> int:
        """The job's exit code, once it has ended."""
        self.out, self.err = self.job.communicate(timeout=20)
        return self.job.returncode


@pytest.fixture
def slurm(tmp_path):
    """It is ended with the test, however that goes."""
    slurm = Slurm(tmp_path)
    yield slurm
    for name in ("code", "late"):
        (tmp_path / name).write_text("1")
    slurm.job.wait(20)


@pytest.mark.parametrize(("code", "asks_again"), [(75, True), (0, False), (1, False)])
def test_slurm_gets_a_job_back_that_saved(slurm, code, asks_again):
    (slurm.folder / "code").write_text(str(code))
    assert slurm.end() == code, slurm.err
    lines = slurm.log()
    assert lines[0].endswith("python -m tvq_pod.main --multihost --config=c.py --workdir=/shared/a b")
    assert (lines[1:] == ["scontrol requeue 7"]) == asks_again


def test_slurm_s_shell_outlives_the_sigterm_that_its_tasks_get(slurm):
    slurm.job.terminate()
    os.kill(slurm.task, signal.SIGTERM)
    assert slurm.end() == 75
    assert slurm.log()[1:] == ["scontrol requeue 7"]


def test_before_slurm_s_time_limit_a_job_saves_goes_on_and_then_saves_and_is_requeued(slurm):
    slurm.job.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B: says
    slurm.wait_for(lambda: "saved" in slurm.log() and "sleep 480" in slurm.log())
    slurm.job.send_signal(signal.SIGUSR1)  # another save, and no second SIGTERM: that one ends without saving
    slurm.wait_for(lambda: slurm.log().count("saved") == 2)
    os.kill(slurm.task, 0)  # it trains on
    (slurm.folder / "late").touch()
    assert slurm.end() == 75, slurm.err
    assert sorted(slurm.log()[1:4]) == ["saved", "saved", "sleep 480"]
    assert slurm.log()[4:] == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_a_job_that_ends_by_itself_near_slurm_s_time_limit_is_left_alone(slurm):
    slurm.job.send_signal(signal.SIGUSR1)
    slurm.wait_for(lambda: "saved" in slurm.log() and "sleep 480" in slurm.log())
    (slurm.folder / "code").write_text("0")
    assert slurm.end() == 0, slurm.err  # and has closed its output: nothing of it sleeps on
    assert sorted(slurm.log()[1:]) == ["saved", "sleep 480"]


def test_a_requeue_that_slurm_refuses_is_said(slurm):
    (slurm.folder / "full").touch()
    (slurm.folder / "code").write_text("75")
    assert slurm.end() == 75
    assert "error: SLURM_JOB_ID=7: scontrol could not requeue it; submit it again" in slurm.err


def test_slurm_sends_the_signal_when_the_script_expects_it():
    text = (ROOT / "launch/slurm.sh").read_text()
    assert re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE) == re.findall(
        r"^early=(\d+)", text, re.MULTILINE
    )
    assert "#SBATCH --requeue\n" in text


def test_the_shell_script_s_flags_are_gcloud_s():
    text = (ROOT / "launch/tpu_vm.sh").read_text().replace("\\\n", " ")
    known = set(itertools.chain(*((*c["values"], *c["switches"]) for c in TABLE["commands"].values()))) | {
        *TABLE["wide"]
    }
    for line in re.findall(r'(?:"\$\{tpus\[@\]\}"|gcloud) .*', text):
        used = set(re.findall(r"--([a-z-]+)", line.partition("--command")[0]))
        assert used <= known, line


def test_python_and_shell_boot_the_same_machines():
    text = (ROOT / "launch/tpu_vm.sh").read_text()
    for chip in CHIPS.values():
        assert chip.runtime_version in text, chip.name
        assert slices.parse(f"{chip.accelerator}-8").chips == 8 // chip.per_name


@pytest.mark.slow(1)
@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("several_slices", [False, True])
def test_libtpu_knows_the_flags(chip, several_slices):
    """It ends a process that gives it one that it does not know."""
    topology = dict(v4="v4:2x2x1", v5e="v5e:2x2", v5p="v5p:2x2x1", v6e="v6e:2x2", tpu7x="tpu7x:2x2x1")[chip]
    environment = os.environ | dict(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_LOG_DIR="disabled",
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        LIBTPU_INIT_ARGS=" ".join(libtpu.flags(chip, several_slices)),
    )
    code = f"from jax.experimental import topologies as t; t.get_topology_desc({topology!r}, platform='tpu')"
    process = forked.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    _, err = process.communicate()
    assert process.returncode == 0, err


def test_python_that_is_too_old_is_replaced(laptop):
    """Ubuntu 22.04 has 3.10."""
    home = laptop.folder / "home"
    tools = laptop.folder / "tools"
    tools.mkdir()
    (home / "tvq_pod").mkdir(parents=True)
    for name in ("python3.11", "python3.12", "python3.13"):
        write_program(tools / name, "exit 1")
    # Fails what needs 3.11, and lets uv make an environment that installs.
    write_program(
        tools / "python3",
        f'echo "$*" | head -n 1 >> {tools}/log; case "$*" in\n*ensurepip*) exit 1 ;;\n'
        f'"-m uv venv"*) for last; do :; done; mkdir -p "$last/bin"; ln -s {tools}/python3 "$last/bin/python" ;;\nesac',
    )
    source = subprocess.run(
        ["git", "archive", "--format=tar.gz", "--prefix=x/", "HEAD"], cwd=ROOT, capture_output=True, check=True
    )
    (home / "tvq_pod/s.tar.gz").write_bytes(source.stdout)
    shutil.copy(ROOT / "launch/worker.sh", home / "tvq_pod")
    done = subprocess.run(
        ["bash", str(home / "tvq_pod/worker.sh"), "install", "s"],
        env=dict(HOME=str(home), PATH=f"{tools}:/usr/bin:/bin", GCE_METADATA_HOST="127.0.0.1:1"),
        capture_output=True,
        text=True,
    )
    assert done.stdout == "tvq_pod@unknown/unknown: installed s\n", done.stdout + done.stderr
    calls = (tools / "log").read_text()
    assert "-m pip install --quiet --user uv" in calls
    assert "-m uv venv --quiet --seed --python 3.11" in calls
    assert f"--constraint {home}/tvq_pod/source/launch/constraints.txt" in calls


def test_a_record_is_whole_or_the_one_before(tmp_path):
    from tvq_pod.errors import UserError

    records = Records(tmp_path / "records")
    records.save(Record(name="a", project=None, zone=None, accelerator="v4-8"))
    assert records.get("a").accelerator == "v4-8"
    assert (records.path("a").stat().st_mode & 0o777, records.folder.stat().st_mode & 0o777) == (0o600, 0o700)
    records.path("a").write_text("")
    with pytest.raises(UserError, match="cannot be read"):
        records.load("a")


def test_a_laptop_needs_no_package_but_absl_and_filelock():
    code = "import launch.pod, sys; print(*{name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = {name for name in done.stdout.split() if not name.startswith("_")}  # what pip itself adds begins so
    assert found - {"launch", "tvq_pod", "sitecustomize", "usercustomize"} == {"absl", "filelock"}


def test_what_two_commands_change_at_once_is_all_there(tmp_path):
    """Each in a process of its own, as two terminals are."""
    records = Records(tmp_path / "records")
    records.save(Record(name="a", project=None, zone=None, accelerator="v4-8"))
    code = (
        "import sys; from launch.record import Records; records = Records(sys.argv[1]); record = records.get('a')\n"
        "for number in range(1, 101): records.change(record, {sys.argv[2]: number})"
    )
    fields = ("attempt", "restarts", "failures", "refusals")
    processes = [
        subprocess.Popen([sys.executable, "-c", code, records.folder, field], cwd=ROOT) for field in fields[1:]
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    found = records.get("a")
    assert [getattr(found, field) for field in fields] == [0, 100, 100, 100]


def test_only_one_process_watches_and_the_kernel_lets_go_when_it_is_killed(tmp_path):
    records = Records(tmp_path / "records")
    code = (
        "import sys, time; from launch.record import Records\n"
        "with Records(sys.argv[1]).held('a') as alone: print(alone, flush=True); time.sleep(100)"
    )
    first = subprocess.Popen([sys.executable, "-c", code, records.folder], cwd=ROOT, stdout=subprocess.PIPE)
    assert first.stdout.readline() == b"True\n"
    with records.held("a") as alone:
        assert not alone
    first.kill()
    first.wait()
    with records.held("a") as alone:
        assert alone
