"""A cloud of its own for every test, with gcloud on the PATH."""

import http.server
import os
import pathlib
import subprocess
import sys
import threading

import pytest

from tests import forked
from tests.launch.cloud import MACHINES, Cloud
from tests.launch.resident import script

ROOT = pathlib.Path(__file__).parent.parent.parent
HERE = pathlib.Path(__file__).parent


class Laptop:
    """Where launch.pod is typed. Machines find the metadata server at `metadata`; resident: the port of resident.py."""

    def __init__(self, folder: pathlib.Path, metadata: str, resident: int):
        self.folder = folder
        self.cloud = Cloud(folder / "cloud")
        self.bin = folder / "bin"
        there = self.cloud.folder / "bin"  # on every machine
        for place in (self.bin, there):
            place.mkdir(parents=True)
            write_program(place / "gcloud", script("gcloud", resident))
        # Only to a machine's own services: what else is done as root would be done to the machine that tests.
        write_program(there / "sudo", 'case $1 in systemctl | journalctl) exec "$@" ;; esac')
        for name in ("systemctl", "journalctl"):
            write_program(there / name, script(name, resident))
        training = f'[ "$2" != tvq_pod.main ] || exec {sys.executable} -SE {HERE}/machine_program.py "$@"'
        write_program(there / "python3", f"{training}\n{script('python', resident)}")
        for name in ("python3.11", "python3.12", "python3.13"):
            write_program(there / name, "exit 1")
        self.environment = os.environ | dict(
            PATH=f"{self.bin}:/usr/bin:/bin", STANDIN=str(self.cloud.folder), PYTHONPATH=str(ROOT)
        )
        where = f"{metadata}{self.cloud.folder}/MACHINE"
        self.set(environment=dict(GCE_METADATA_HOST=where, GCE_METADATA_IP=where))

    def start(self, command: str, *flags: str) -> subprocess.Popen:
        """One command of launch.pod."""
        program = [sys.executable, "-m", "launch.pod", command, f"--records={self.folder / 'records'}"]
        return forked.Popen(
            [*program, *flags],
            env=self.environment,
            cwd=ROOT,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def pod(self, command: str, *flags: str) -> tuple[int, str, str]:
        """Its exit code, output and messages."""
        process = self.start(command, *flags)
        out, err = process.communicate(timeout=200)
        return process.returncode, out, err

    def must(self, command: str, *flags: str) -> str:
        """The output of one that must succeed."""
        code, out, err = self.pod(command, *flags)
        assert code == 0, out + err
        return out

    def set(self, **values) -> None:
        """What shall happen."""
        with self.cloud.open() as state:
            state.update(values)

    def get(self, name: str):
        """What has happened."""
        with self.cloud.open() as state:
            return state.get(name)


def write_program(path: pathlib.Path, lines: str) -> None:
    """An executable shell script."""
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a machine may ask about itself: GET CLOUD/NODE/WORKER/computeMetadata/v1/instance/attributes/NAME."""

    def do_GET(self):
        where, _, attribute = self.path.partition("/computeMetadata/v1/instance/attributes/")
        folder, node, worker = where.rsplit("/", 2)
        cloud = Cloud(folder)
        with cloud.open() as state:
            nodes = {n: MACHINES[queued["type"]] for queued in state["queued"].values() for n in cloud.nodes(queued)}
        values = {
            "agent-worker-number": worker,
            "tpu-env": f"ACCELERATOR_TYPE: 'v'\nNODE_ID: '{node}'\nWORKER_ID: '{worker}'\n",
            "worker-network-endpoints": ",".join(["127.0.0.1"] * nodes.get(node, 0)),
        }
        known = self.headers["Metadata-Flavor"] == "Google" and node in nodes and attribute in values
        text = values[attribute].encode() if known else b""
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format, *args):
        pass


@pytest.fixture(scope="session")
def metadata():
    """The server's address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="session")
def resident():
    """The port of the process that runs the programs on the PATH."""
    command = [sys.executable, str(HERE / "resident.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        yield int(process.stdout.readline())


@pytest.fixture
def laptop(tmp_path, metadata, resident):
    """It is taken apart at the end, with all that runs."""
    laptop = Laptop(tmp_path, metadata, resident)
    yield laptop
    with laptop.cloud.open() as state:
        for queued in state["queued"].values():
            laptop.cloud.destroy(queued)
