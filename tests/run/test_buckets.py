"""A bucket that does not exist, is forbidden, or may only be read: servers on loopback, real processes, one line."""

import contextlib
import http.client
import http.server
import json
import threading

import pytest

from tests.buckets import reached_at
from tests.command import finish, start

WORDS = {403: "someone does not have storage.objects.list access", 401: "Anonymous caller", 404: "Not Found"}


@contextlib.contextmanager
def answering(answer):
    """The port of a server. answer: (method, path, headers, body) -> (status, headers, content)."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = answer(self.command, self.path, dict(self.headers.items()), body)
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = handle_one

        def log_message(self, format, *args):
            pass

    there = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=there.serve_forever, daemon=True).start()
    yield there.server_port
    there.shutdown()


def refusal(status):
    content = json.dumps(dict(error=dict(code=status, message=WORDS[status]))).encode()
    return status, [("Content-Type", "application/json")], content


def refused_in_one_line(*flags):
    code, out, err = finish(start(*flags))
    assert (code, out) == (1, ""), err
    assert err.count("\n") == 1, err
    return err


def check_all(config_file, tmp_path, bucket, message):
    """The run's folder, for training and for looking at; a store; a mixture."""
    config, local = f"--config={config_file}", f"--workdir={tmp_path}/run"
    for setting, flags in {
        f"--workdir={bucket}": [[config, f"--workdir={bucket}"], [f"--workdir={bucket}", "--mode=eval"]],
        f"config.data.store={bucket}": [[config, local, f"--config.data.store={bucket}"]],
        f"config.data.mixture={bucket}": [[config, local, f"--config.data.mixture={bucket}=1"]],
    }.items():
        for command in flags:
            assert refused_in_one_line(*command).startswith(f"error: {setting}: {message}")
    assert not (tmp_path / "run").exists()


def test_a_bucket_that_does_not_exist_is_not_made(config_file, tmp_path, server, monkeypatch):
    files = reached_at(monkeypatch, server)
    check_all(config_file, tmp_path, "gs://nowhere/run", "the bucket gs://nowhere does not exist;")
    assert [name.rstrip("/") for name in files.ls("")] == ["bucket"]
    err = refused_in_one_line("--workdir=gs://bucket/nothing", "--mode=eval")
    assert err.startswith("error: --workdir=gs://bucket/nothing: has no config.json")


@pytest.mark.slow(1)
def test_a_bucket_that_is_forbidden_says_so(config_file, tmp_path, monkeypatch):
    with answering(lambda *request: refusal(403)) as port:
        reached_at(monkeypatch, port)
        check_all(config_file, tmp_path, "gs://closed/run", "the bucket gs://closed is forbidden (")
        assert WORDS[403] in refused_in_one_line("--workdir=gs://closed/run", "--mode=eval")
    with answering(lambda *request: refusal(401)) as port:
        reached_at(monkeypatch, port)
        err = refused_in_one_line("--workdir=gs://closed/run", "--mode=eval")
        assert err.startswith("error: --workdir=gs://closed/run: the bucket gs://closed is forbidden (Anonymous caller")


def test_a_bucket_that_may_only_be_read_is_no_place_to_train(config_file, server, monkeypatch):
    def answer(method, path, headers, body):
        if method != "GET":
            return refusal(403)
        connection = http.client.HTTPConnection("127.0.0.1", server)
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        content = response.read()
        connection.close()
        return response.status, [("Content-Type", response.getheader("Content-Type"))], content

    with answering(answer) as port:
        reached_at(monkeypatch, port)
        code, _, err = finish(start(f"--config={config_file}", "--workdir=gs://bucket/read_only"))
    assert code == 1
    last = err.splitlines()[-1]  # before it TensorStore says that it has no credentials
    assert last.startswith("error: --workdir=gs://bucket/read_only: can't be used (")
    assert WORDS[403] in last
    assert "Traceback" not in err
