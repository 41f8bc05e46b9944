"""A stand-in for gcloud and for the machines it makes, for tests: programs on the PATH, real processes, real files.

    python standin.py gcloud|sudo|systemctl|journalctl|service|python ARGUMENTS

All of it lives in the folder that the environment's STANDIN names: state.json, one folder for each machine with its
home, and buckets. Queued resources go through the states that the API has; error texts have the form that gcloud
528.0.0 gives them (seen from the real one, against an API that answered as the public ones do). What a test wants to
happen is written into the state by `Cloud`.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve()
TABLE = json.loads((HERE.parent / "gcloud_flags.json").read_text())
MACHINES = {"v4-8": 1, "v4-16": 2, "v5litepod-8": 1, "v5litepod-16": 4}
SPOT_GRACE_SECONDS = 30.0
# Behind what is denied or not found.
TAIL = (
    ". This command is authenticated as me@x.org which is the active account specified by the [core/account] property"
)


class Cloud:
    """The state, opened for change by one process at a time. Attributes of `state`, with what a test may set:

    waits: seconds from the request to the slice; zone_full_until: time before which there are none; create_errors:
    [[STATUS, message], ...] for the next requests; fails: [code, message] of the next request that is accepted;
    logged_in; ssh_failures: how many of the next ssh calls drop; broken: machines (NODE/WORKER) whose installation
    fails; environment: of all machines; wait_at and training: what the pretended training does (see there); kill_at:
    the number of the call whose caller is killed when it is done, or, negative, before.
    """

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)

    @contextlib.contextmanager
    def open(self):
        """The state: a dict, saved at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / "state.lock", "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.folder / "state.json"
            state = json.loads(path.read_text()) if path.exists() else {}
            defaults = dict(queued={}, waits=0.0, zone_full_until=0.0, create_errors=[], fails=None, logged_in=True)
            defaults |= dict(lost_nodes=[], ssh_failures=0, broken=[], environment={}, wait_at=0)
            defaults |= dict(calls=0, kill_at=0, log=[])
            for name, value in defaults.items():
                state.setdefault(name, value)
            self.advance(state)
            yield state
            draft = path.with_suffix(".writing")
            draft.write_text(json.dumps(state, indent=1))
            draft.replace(path)

    def now(self) -> float:
        """Of the fake clock, if there is one."""
        with contextlib.suppress(FileNotFoundError):
            return float((self.folder / "clock").read_text())
        return time.time()

    def machine(self, node: str, worker: int) -> pathlib.Path:
        """A machine's folder."""
        return self.folder / "machines" / f"{node}-{worker}"

    def nodes(self, queued: dict) -> list[str]:
        """Names of a request's nodes."""
        count = queued["count"]
        return [f"{queued['prefix']}-{i}" for i in range(count)] if count > 1 else [queued["prefix"]]

    def advance(self, state: dict) -> None:
        """What time does to requests."""
        now = self.now()
        for name, queued in list(state["queued"].items()):
            if queued["state"] in ("ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"):
                waited = now - queued["asked_at"]
                ready = waited >= state["waits"] and now >= state["zone_full_until"]
                queued["state"] = "PROVISIONING" if ready else "WAITING_FOR_RESOURCES"
                if ready and queued["fails"]:
                    queued["state"] = "FAILED"
                elif ready:
                    for node in self.nodes(queued):
                        for worker in range(MACHINES[queued["type"]]):
                            (self.machine(node, worker) / "home").mkdir(parents=True, exist_ok=True)
                    queued["state"] = "ACTIVE"
            elif queued["state"] == "SUSPENDING" and now >= queued["gone_at"]:
                self.destroy(queued)
                queued["state"] = "SUSPENDED"
            elif queued["state"] == "DELETING":
                self.destroy(queued)
                del state["queued"][name]

    def destroy(self, queued: dict) -> None:
        """Power off, disks gone."""
        for node in self.nodes(queued):
            for worker in range(MACHINES[queued["type"]]):
                folder = self.machine(node, worker)
                for pid in pids(folder):
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)
                for _ in range(100):  # what was killed may still write
                    shutil.rmtree(folder, ignore_errors=True)
                    if not folder.exists():
                        break
                    time.sleep(0.05)

    def preempt(self, name: str, grace: float = SPOT_GRACE_SECONDS) -> None:
        """Takes a slice back: its machines are shut down, with so much time, and are gone then."""
        with self.open() as state:
            queued = state["queued"][name]
            queued.update(state="SUSPENDING", gone_at=self.now() + grace, initiator="SERVICE")
            for node in self.nodes(queued):
                for worker in range(MACHINES[queued["type"]]):
                    for pid in pids(self.machine(node, worker)):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGTERM)


def pids(folder: pathlib.Path) -> list[int]:
    """Main processes of a machine's running services; each leads a group."""
    return [int(path.read_text()) for path in folder.glob("services/*.pid") if path.read_text()]


def fail(text: str, code: int = 1):
    """Ends as gcloud does."""
    print(text, file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------- gcloud


def gcloud(arguments: list[str]) -> None:
    cloud = Cloud(os.environ["STANDIN"])
    command, flags, places = parsed(arguments)
    with cloud.open() as state:
        if "STANDIN_MACHINE" not in os.environ:
            state["calls"] += 1
            state["log"].append(arguments)
        doomed = {state["kill_at"]: "after", -state["kill_at"]: "before"}.get(state["calls"])
        if not state["logged_in"]:
            fail(
                f"ERROR: (gcloud.{command.replace(' ', '.')}) You do not currently have an active account selected.\n"
                "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n"
            )
    if doomed == "before":
        os.kill(os.getppid(), signal.SIGKILL)
    try:
        COMMANDS[command](cloud, flags, places, f"ERROR: (gcloud.{command.replace(' ', '.')})")
    finally:
        if doomed == "after":  # whoever called never hears of what was done
            os.kill(os.getppid(), signal.SIGKILL)


def parsed(arguments: list[str]) -> tuple[str, dict, list[str]]:
    """Command, flags and places; what gcloud's reference does not have is refused as gcloud does."""
    command = next((c for c in TABLE["commands"] if arguments[: len(c.split())] == c.split()), None)
    if command is None:
        fail(f"ERROR: (gcloud) Invalid choice: {arguments}", 2)
    known, flags, places = TABLE["commands"][command], {}, []
    for argument in arguments[len(command.split()) :]:
        if not argument.startswith("--"):
            places.append(argument)
            continue
        name, equals, value = argument[2:].partition("=")
        takes_value = name in [*known["values"], "format", "project"]
        is_known = takes_value or name in [*known["switches"], "quiet"]
        if not is_known or takes_value != bool(equals):
            fail(f"ERROR: (gcloud.{command.replace(' ', '.')}) unrecognized arguments: {argument}", 2)
        flags[name] = value if equals else True
    missing = [name for name in known["required"] if name not in flags]
    if missing or len(places) < known["places"]:
        fail(f"ERROR: (gcloud.{command.replace(' ', '.')}) argument {missing or places}: Must be specified.", 2)
    return command, flags, places


def full_name(name: str) -> str:
    return f"projects/p/locations/z/queuedResources/{name}"


def create(cloud, flags, places, error):
    name = places[0]
    with cloud.open() as state:
        if name in state["queued"]:
            fail(f"{error} ALREADY_EXISTS: Resource '{full_name(name)}' already exists")
        if state["create_errors"]:
            status, message = state["create_errors"].pop(0)
            refused = f"{error} {status}: {message}"
        elif flags["accelerator-type"] not in MACHINES:
            refused = f"{error} INVALID_ARGUMENT: the accelerator {flags['accelerator-type']} was not found in zone z"
        else:
            refused = None
            state["queued"][name] = dict(
                state="ACCEPTED",
                asked_at=cloud.now(),
                type=flags["accelerator-type"],
                count=int(flags.get("node-count", 1)),
                prefix=flags.get("node-prefix") or flags.get("node-id") or name,
                labels=dict(pair.split("=") for pair in flags.get("labels", "").split(",") if pair),
                spot="spot" in flags,
                fails=state["fails"],
            )
            state["fails"], state["lost_nodes"] = None, []
    if refused:
        fail(refused)
    print(f"Create request issued for: [{name}]\nCreated queued_resource [{name}].", file=sys.stderr)


def described(cloud, name, queued):
    node = dict(acceleratorType=queued["type"], labels=queued["labels"], runtimeVersion="r")
    specs = [dict(nodeId=node_id, parent="projects/p/locations/z", node=node) for node_id in cloud.nodes(queued)]
    state = dict(state=queued["state"], stateInitiator=queued.get("initiator", "SERVICE"))
    if queued["state"] == "FAILED":
        code, message = queued["fails"]
        state["failedData"] = dict(error=dict(code=code, message=message))
    return dict(name=full_name(name), state=state, tpu=dict(nodeSpec=specs)) | (dict(spot={}) if queued["spot"] else {})


def describe(cloud, flags, places, error):
    with cloud.open() as state:
        queued = state["queued"].get(places[0])
        text = queued and json.dumps(described(cloud, places[0], queued), indent=2)
        if queued and flags.get("format") == "value(state.state)":
            text = queued["state"]
    if not text:
        fail(f"{error} NOT_FOUND: Resource '{full_name(places[0])}' was not found{TAIL}")
    print(text)


def delete(cloud, flags, places, error):
    with cloud.open() as state:
        queued = state["queued"].get(places[0])
        allowed = "force" in flags or (queued and queued["state"] in ("ACCEPTED", "FAILED", "SUSPENDED"))
        if queued and allowed:
            queued["state"] = "DELETING"
            cloud.advance(state)
    if not queued:
        fail(f"{error} NOT_FOUND: Resource '{full_name(places[0])}' was not found")
    if not allowed:
        fail(f"{error} FAILED_PRECONDITION: the queued resource is {queued['state']} and has nodes")
    print(f"Deleted queued_resource [{places[0]}].", file=sys.stderr)


def describe_node(cloud, flags, places, error):
    with cloud.open() as state:
        for queued in state["queued"].values():
            if places[0] in cloud.nodes(queued) and queued["state"] == "ACTIVE":
                lost = places[0] in state["lost_nodes"]
                ends = [dict(ipAddress=f"10.0.0.{i}", port=8470) for i in range(MACHINES[queued["type"]])]
                print(json.dumps(dict(name=places[0], state="PREEMPTED" if lost else "READY", networkEndpoints=ends)))
                return
    fail(f"{error} NOT_FOUND: Resource 'projects/p/locations/z/nodes/{places[0]}' was not found{TAIL}")


def targets(cloud, name, flags, error) -> list[tuple[str, int]]:
    """Nodes and workers of an ssh or scp."""
    with cloud.open() as state:
        queued = state["queued"].get(name)
        if not queued:
            fail(f"{error} NOT_FOUND: Resource '{full_name(name)}' was not found")
        if queued["state"] != "ACTIVE":
            fail(f'{error} This TPU has state "{queued["state"]}", so it cannot be currently connected to.')
        if set(state["lost_nodes"]) & set(cloud.nodes(queued)):
            fail(f'{error} This TPU has terminal state "PREEMPTED", so it cannot be used anymore.')
        dropped = state["ssh_failures"] > 0
        state["ssh_failures"] -= dropped
        nodes, workers = cloud.nodes(queued), list(range(MACHINES[queued["type"]]))
    if dropped:
        fail(f"{error} [/usr/bin/ssh] exited with return code [255].", 255)
    node, worker = flags.get("node", "0"), flags.get("worker", "0")
    nodes = nodes if node == "all" else [nodes[int(node)]]
    workers = workers if worker == "all" else [workers[int(worker)]]
    return [(n, w) for n in nodes for w in workers]


def machine_environment(cloud, node, worker) -> dict:
    """What a process on a machine finds: nothing of the test's own environment, but what the state says."""
    folder = cloud.machine(node, worker)
    with cloud.open() as state:
        extra = state["environment"]
    return dict(
        HOME=str(folder / "home"),
        PATH=f"{cloud.folder / 'bin'}:/usr/bin:/bin",
        STANDIN=str(cloud.folder),
        STANDIN_MACHINE=str(folder),
        STANDIN_NAME=f"{node}/{worker}",
    ) | {
        name: value.replace("MACHINE", f"{node}/{worker}").replace("WORKER", str(worker))
        for name, value in extra.items()
    }


def ssh(cloud, flags, places, error):
    where = targets(cloud, places[0], flags, error)
    if "command" not in flags:
        fail("the stand-in has no terminals")
    processes = [
        subprocess.Popen(
            ["bash", "-c", flags["command"]],
            env=machine_environment(cloud, node, worker),
            cwd=cloud.machine(node, worker) / "home",
            stdin=subprocess.DEVNULL,
        )
        for node, worker in where
    ]
    codes = [process.wait() for process in processes]
    for (_, worker), code in zip(where, codes, strict=True):
        if code and len(where) > 1:
            print(
                f"##### Command execution on worker {worker} failed with exit status {code}. Continuing.",
                file=sys.stderr,
            )
    sys.exit(next((code for code in codes if code), 0))


def scp(cloud, flags, places, error):
    *sources, to = places
    name, _, folder = to.partition(":")
    for node, worker in targets(cloud, name, flags, error):
        for source in map(pathlib.Path, sources):
            target = cloud.machine(node, worker) / "home" / folder
            if source.is_dir():
                shutil.copytree(source, target / source.name, dirs_exist_ok=True)
            else:
                shutil.copy(source, target)


def read_object(cloud, url: str) -> str:
    """From the server in the environment, if there is one. Raises OSError."""
    bucket, _, name = url.removeprefix("gs://").partition("/")
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if not host:
        return (cloud.folder / "buckets" / bucket / name).read_text()
    import urllib.request  # which takes longer than all the rest

    name = urllib.parse.quote(name, safe="")
    return urllib.request.urlopen(f"{host}/storage/v1/b/{bucket}/o/{name}?alt=media").read().decode()


def storage_cat(cloud, flags, places, error):
    try:
        text = read_object(cloud, places[0])
    except OSError:
        fail(f"{error} The following URLs matched no objects or files:\n{places[0]}")
    sys.stdout.write(text)


def get_value(cloud, flags, places, error):
    print(dict({"core/project": "my-project", "compute/zone": "us-central2-b"})[places[0]])


def storage_cp(cloud, flags, places, error):
    data, to = pathlib.Path(places[0]).read_bytes(), places[1]
    host = os.environ.get("STORAGE_EMULATOR_HOST")
    if host:
        import urllib.request

        bucket, _, name = to.removeprefix("gs://").partition("/")
        query = urllib.parse.urlencode(dict(uploadType="media", name=name))
        request = urllib.request.Request(f"{host}/upload/storage/v1/b/{bucket}/o?{query}", data, method="POST")
        urllib.request.urlopen(request).close()
        return
    path = cloud.folder / "buckets" / to.removeprefix("gs://")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


COMMANDS = {
    "compute tpus queued-resources create": create,
    "compute tpus queued-resources describe": describe,
    "compute tpus queued-resources delete": delete,
    "compute tpus queued-resources ssh": ssh,
    "compute tpus queued-resources scp": scp,
    "compute tpus tpu-vm describe": describe_node,
    "config get-value": get_value,
    "storage cat": storage_cat,
    "storage cp": storage_cp,
}

# ---------------------------------------------------------------------- a machine's own programs


def sudo(arguments: list[str]) -> None:
    """Only to a machine's own services: what else is done as root would be done to the machine that tests."""
    if arguments[0] in ("systemctl", "journalctl"):
        os.execvp(arguments[0], arguments)


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
    subprocess.Popen(
        [sys.executable, "-S", str(HERE), "service", unit, setting(text, "ExecStart"), setting(text, "ExecStopPost")],
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while pid.exists() and not pid.read_text():
        time.sleep(0.01)


def setting(text: str, name: str) -> str:
    found = re.search(rf"^{name}=(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def service(arguments: list[str]) -> None:
    """Runs one to its end, and what comes after; the log is its journal."""
    unit, command, after = arguments
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
            broken = os.environ["STANDIN_NAME"] in state["broken"]
        if broken:
            fail("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    elif arguments[:2] == ["-m", "launch.copy"]:
        cloud = Cloud(os.environ["STANDIN"])
        target = cloud.folder / "buckets" / arguments[3].removeprefix("gs://")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(arguments[2], target)
    elif arguments[:2] == ["-m", "tvq_pod.main"]:
        pretend_training(arguments[2:])
    else:
        os.execv(sys.executable, [sys.executable, *arguments])


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
        if first:
            path.with_suffix(".w").write_text(json.dumps(values))
            path.with_suffix(".w").replace(path)

    step = saved

    def preempted(*_):
        write("preempted", step, step)
        os._exit(75)

    signal.signal(signal.SIGTERM, preempted)
    print(f"begins after step {saved}, with {os.environ.get('SECRET', 'no')} secret", flush=True)
    for step in range(saved + 1, goal + 1):
        pause(cloud, step)
        saved = step if step % 5 == 0 else saved
        write("training", step, saved)
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
    globals()[sys.argv[1]](sys.argv[2:])
