"""gcloud, as a program on the PATH of a test (see resident.py).

Flags that gcloud's reference does not have are refused; error texts have the form that gcloud 528.0.0 gives them (seen
from the real one, against an API that answered as the public ones do). The environment's STANDIN names its cloud.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import urllib.parse
import urllib.request

from tests.launch.cloud import MACHINES, Cloud, fail

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TABLE = json.loads((ROOT / "tests/launch/gcloud_flags.json").read_text())
# Behind what is denied or not found.
TAIL = (
    ". This command is authenticated as me@x.org which is the active account specified by the [core/account] property"
)


def gcloud(arguments: list[str]) -> None:
    cloud = Cloud(os.environ["STANDIN"])
    command, flags, places = parsed(arguments)
    with cloud.open() as state:
        if "STANDIN_MACHINE" not in os.environ:
            state["calls"] += 1
            state["log"].append(arguments)
        doomed = {state["kill_at"]: "after", -state["kill_at"]: "before"}.get(state["calls"])
        if state["expired"] and command not in LOCAL:
            fail(
                f"ERROR: (gcloud.{command.replace(' ', '.')}) There was a problem refreshing your current auth tokens: "
                "Reauthentication failed. cannot prompt during non-interactive execution.\nPlease run:\n\n"
                "  $ gcloud auth login\n\nto obtain new credentials.\n"
            )
        if not state["logged_in"] and command not in LOCAL:
            fail(
                f"ERROR: (gcloud.{command.replace(' ', '.')}) You do not currently have an active account selected.\n"
                "Please run:\n\n  $ gcloud auth login\n\nto obtain new credentials.\n"
            )
    if doomed == "before":
        os.kill(int(os.environ["STANDIN_CALLER"]), signal.SIGKILL)
    try:
        COMMANDS[command](cloud, flags, places, f"ERROR: (gcloud.{command.replace(' ', '.')})")
    finally:
        if doomed == "after":  # whoever called never hears of what was done
            os.kill(int(os.environ["STANDIN_CALLER"]), signal.SIGKILL)


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
        bucket, _, name = to.removeprefix("gs://").partition("/")
        query = urllib.parse.urlencode(dict(uploadType="media", name=name))
        request = urllib.request.Request(f"{host}/upload/storage/v1/b/{bucket}/o?{query}", data, method="POST")
        urllib.request.urlopen(request).close()
        return
    path = cloud.folder / "buckets" / to.removeprefix("gs://")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def version(cloud, flags, places, error):
    with cloud.open() as state:
        print(json.dumps({"Google Cloud SDK": state["sdk"], "core": "2025.06.20"}, indent=2))


def auth_list(cloud, flags, places, error):
    with cloud.open() as state:
        print(json.dumps([dict(account="me@x.org", status="ACTIVE")] if state["logged_in"] else []))


def describe_project(cloud, flags, places, error):
    with cloud.open() as state:
        found = state["project"]
    if places[0] != "my-project":
        fail(
            f"{error} User [me@x.org] does not have permission to access projects instance [{places[0]}] (or it may "
            f"not exist): The caller does not have permission{TAIL}"
        )
    print(json.dumps(dict(projectId=places[0], projectNumber="1", lifecycleState=found)))


def list_services(cloud, flags, places, error):
    with cloud.open() as state:
        found = [dict(config=dict(name=name), state="ENABLED") for name in state["services"]]
    print(json.dumps(found))


def offered(kind, names):
    """A command that lists what a zone has, with full names, as the API does."""

    def command(cloud, flags, places, error):
        with cloud.open() as state:
            here = [name for name in names if name not in state["lacks"]]
        where = f"projects/my-project/locations/{flags['zone']}/{kind}"
        print(json.dumps([dict(name=f"{where}/{name}", type=name) for name in here]))

    return command


def list_quotas(cloud, flags, places, error):
    with cloud.open() as state:
        found = state["quotas"]
    if isinstance(found, str):
        fail(f"{error} {found}")
    print(json.dumps(found))


def describe_bucket(cloud, flags, places, error):
    with cloud.open() as state:
        found = state["buckets"].get(places[0].removeprefix("gs://"))
    if found is None:
        fail(f"{error} {places[0]} not found: 404.")
    location, kind, *regions = found
    listed = dict(data_locations=regions) if regions else {}
    print(json.dumps(dict(name=places[0].removeprefix("gs://"), location=location, location_type=kind) | listed))


LOCAL = ("version", "auth list", "config get-value")  # they need no login
COMMANDS = {
    "version": version,
    "auth list": auth_list,
    "projects describe": describe_project,
    "services list": list_services,
    "compute tpus tpu-vm accelerator-types list": offered("acceleratorTypes", MACHINES),
    "compute tpus tpu-vm versions list": offered("runtimeVersions", ["tpu-ubuntu2204-base", "v2-alpha-tpuv5-lite"]),
    "beta quotas info list": list_quotas,
    "storage buckets describe": describe_bucket,
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
