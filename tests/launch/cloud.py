"""The state of the stand-in cloud: queued resources, their machines, and what a test wants to happen to them.

All of it lives in one folder: state.json, a folder for each machine with its home, and buckets. Queued resources go
through the states that the API has.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import signal
import sys
import time
from typing import NoReturn

MACHINES = {"v4-8": 1, "v4-16": 2, "v5litepod-8": 1, "v5litepod-16": 4}
SPOT_GRACE_SECONDS = 30.0


class Cloud:
    """The state, opened for change by one process at a time. Attributes of `state`, with what a test may set:

    waits: seconds from the request to the slice; zone_full_until: time before which there are none; create_errors:
    [[STATUS, message], ...] for the next requests; fails: [code, message] of the next request that is accepted;
    logged_in; expired: whether the login's token is; sdk: gcloud's version; project: its state; services: the APIs
    that are enabled; lacks: names of types and versions that the zone does not offer; quotas: as the Cloud Quotas API
    lists them, or a text with which that fails; buckets: by name, location and its type; ssh_failures: how many of
    the next ssh calls drop; broken: machines (NODE/WORKER) whose installation fails; versions: the packages that a
    machine (NODE/WORKER) says it has; environment: of all machines; wait_at and training: what the pretended training
    does (see there); kill_at: the number of the call whose caller is killed when it is done, or, negative, before.
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
            defaults |= dict(lost_nodes=[], ssh_failures=0, broken=[], versions={}, environment={}, wait_at=0)
            defaults |= dict(sdk="528.0.0", expired=False, project="ACTIVE", lacks=[], quotas=[])
            defaults |= dict(services=["tpu.googleapis.com", "storage.googleapis.com"])
            defaults |= dict(buckets={"bucket": ["US-CENTRAL2", "region"]})
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

    def set_clock(self, now: float) -> None:
        """From now on the clock is a fake one. Whoever reads it meanwhile finds a whole number."""
        draft = self.folder / "clock.writing"
        draft.write_text(str(now))
        draft.replace(self.folder / "clock")

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
    found = []
    for path in folder.glob("services/*.pid"):
        with contextlib.suppress(FileNotFoundError):  # a service that ends meanwhile
            found.append(path.read_text())
    return [int(text) for text in found if text]


def fail(text: str, code: int = 1) -> NoReturn:
    """Ends a program as gcloud ends."""
    print(text, file=sys.stderr)
    sys.exit(code)
