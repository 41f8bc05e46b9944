"""What a machine of the stand-in cloud has on its PATH (see resident.py): systemctl and journalctl, as much of them as
worker.sh calls; and python, which pretends to make environments, to install and to train. STANDIN names the
cloud, STANDIN_MACHINE the machine's folder.

    python machine_program.py -m tvq_pod.main ARGUMENTS        a training, which is a process of its own, for signals
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))  # a program: nobody says where its modules are

from tests.launch.cloud import Cloud, fail  # noqa: E402
from tvq_pod.run.goodput_table import KINDS  # noqa: E402


def services() -> pathlib.Path:
    folder = pathlib.Path(os.environ["STANDIN_MACHINE"]) / "services"
    folder.mkdir(exist_ok=True)
    return folder


def systemctl(arguments: list[str]) -> None:
    """link, daemon-reload, reset-failed, start, restart, stop, is-active, show."""
    verb, names = arguments[0], [a for a in arguments[1:] if not a.startswith("-")]
    if verb == "link":
        for path in map(pathlib.Path, names):
            (services() / path.name).unlink(missing_ok=True)
            (services() / path.name).symlink_to(path)
    elif verb in ("start", "restart"):
        if verb == "restart":
            stop_service(names[0])
        if not active(names[0]):
            start_service(names[0])
    elif verb == "stop":
        stop_service(names[0])
    elif verb == "is-active":
        sys.exit(0 if active(names[0]) else 3)
    elif verb == "show":
        print("ActiveState=" + ("active" if active(names[-1]) else "inactive"))


def active(unit: str) -> bool:
    return (services() / f"{unit}.pid").exists()


def start_service(unit: str) -> None:
    """As systemd: its own session, nothing inherited but the machine's environment; returns when it runs."""
    text = (services() / unit).read_text()
    pid = services() / f"{unit}.pid"
    pid.write_text("")
    if not os.fork():
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        try:
            service(unit, setting(text, "ExecStart"), setting(text, "ExecStopPost"))
        finally:
            os._exit(0)
    while pid.exists() and not pid.read_text():
        time.sleep(0.01)


def setting(text: str, name: str) -> str:
    found = re.search(rf"^{name}=(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def service(unit: str, command: str, after: str) -> None:
    """Runs one to its end, and what comes after; the log is its journal."""
    folder = services()
    with open(folder / f"{unit}.journal", "ab") as journal:
        process = subprocess.Popen(command.split(" "), stdout=journal, stderr=journal, process_group=0, cwd="/")
        draft = folder / f"{unit}.pid.writing"
        draft.write_text(str(process.pid))
        draft.replace(folder / f"{unit}.pid")
        code = process.wait()
    ended = dict(EXIT_CODE="exited", EXIT_STATUS=str(code))
    if code < 0:
        ended = dict(EXIT_CODE="killed", EXIT_STATUS=signal.Signals(-code).name.removeprefix("SIG"))
    if after:
        subprocess.run(after.split(" "), env=os.environ | ended, check=False)
    (folder / f"{unit}.pid").unlink(missing_ok=True)


def stop_service(unit: str) -> None:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        os.kill(int((services() / f"{unit}.pid").read_text()), signal.SIGTERM)
    while active(unit):
        time.sleep(0.02)


def journalctl(arguments: list[str]) -> None:
    unit = next(a.partition("=")[2] for a in arguments if a.startswith("--unit="))
    lines = (services() / f"{unit}.journal").read_text().splitlines(keepends=True)
    n = next((int(a.partition("=")[2]) for a in arguments if a.startswith("--lines=")), len(lines))
    sys.stdout.writelines(lines[-n:])


def python(arguments: list[str]) -> None:
    """A python that pretends: to make environments, to install, and to train."""
    if arguments[:2] == ["-m", "venv"]:
        folder = pathlib.Path(arguments[2]) / "bin"
        folder.mkdir(parents=True)
        (folder / "python").symlink_to(pathlib.Path(os.environ["STANDIN"]) / "bin" / "python3")
    elif arguments[:3] == ["-m", "pip", "install"]:
        with Cloud(os.environ["STANDIN"]).open() as state:
            state["pip"] = {name: os.environ.get(name) for name in ("PIP_INDEX_URL", "HTTPS_PROXY", "SECRET")}
            broken = os.environ["STANDIN_NAME"] in state["broken"]
        if broken:
            fail("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    elif arguments[:2] == ["-m", "tvq_pod.run.packages"]:
        with Cloud(os.environ["STANDIN"]).open() as state:
            versions = state["versions"].get(os.environ["STANDIN_NAME"])
        print(versions or versions_here())
    elif arguments[:2] == ["-m", "launch.upload"]:
        cloud = Cloud(os.environ["STANDIN"])
        target = cloud.folder / "buckets" / arguments[3].removeprefix("gs://")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(arguments[2], target)
    elif arguments[0] != "-c":  # with which its version is asked for
        fail(f"the stand-in has no {arguments}")


@functools.cache
def versions_here() -> str:
    """Of the packages that this machine has."""
    from tvq_pod.run import packages  # not for a training: `python -S` does not find what it imports

    return packages.summary(packages.installed())


def pretend_training(arguments: list[str]) -> None:
    """Counts steps of 20 ms, from the newest one that it saved (every fifth), and waits before the one that the state's
    `wait_at` names; ends as `training` says, an entry an attempt: dict(steps=, exit=). The first machine writes the
    status file."""
    cloud = Cloud(os.environ["STANDIN"])
    workdir = next(a.partition("=")[2] for a in arguments if a.startswith("--workdir="))
    folder = cloud.folder / "buckets" / workdir.removeprefix("gs://")
    folder.mkdir(parents=True, exist_ok=True)
    first = os.environ["STANDIN_NAME"].endswith("/0") and not os.environ["STANDIN_NAME"].endswith("-1/0")
    attempt = int((pathlib.Path.home() / "tvq_pod" / "attempt").read_text().rpartition("-")[2])
    with cloud.open() as state:
        plan = state.get("training", [])
        plan = plan[min(attempt, len(plan)) - 1] if plan else {}
        state.setdefault("attempts", []).append([os.environ["STANDIN_NAME"], attempt, arguments])
    path, goal = folder / "status.json", 20
    saved = json.loads(path.read_text())["saved_step"] if path.exists() else 0

    def write(state, step, saved):
        values = dict(state=state, step=step, num_steps=goal, saved_step=saved, saved_at=time.time(), loss=1.0)
        values |= dict(tokens_per_second=1000.0, time=time.time(), run_id=os.environ["TVQ_POD_RUN_ID"])
        spent = {kind: 0.0 for kind in KINDS} | dict(steps=90.0, waiting=30.0)
        values |= dict(goodput=dict(goodput=0.75, starts=attempt, seconds=spent))
        if first:
            path.with_suffix(".w").write_text(json.dumps(values))
            path.with_suffix(".w").replace(path)

    ended = saved  # steps that have

    def preempted(*_):
        write("preempted", ended, ended)
        os._exit(75)

    signal.signal(signal.SIGTERM, preempted)
    print(f"begins after step {saved}, with {os.environ.get('SECRET', 'no')} secret", flush=True)
    for step in range(saved + 1, goal + 1):
        pause(cloud, step)
        saved = step if step % 5 == 0 else saved
        write("training", step, saved)
        ended = step
        if step - plan.get("steps", goal + 1) >= 0:
            write("failed", step, saved)
            print("error: as planned", flush=True)
            sys.exit(plan["exit"])
    write("done", goal, goal)


def pause(cloud: Cloud, step: int) -> None:
    """For as long as the test wants."""
    time.sleep(0.02)
    while json.loads((cloud.folder / "state.json").read_text())["wait_at"] == step:
        time.sleep(0.1)


if __name__ == "__main__":
    pretend_training(sys.argv[3:])
