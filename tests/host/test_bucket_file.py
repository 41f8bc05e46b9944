"""What is appended to an object in a bucket stays there, whoever else writes, and whatever the bucket answers."""

import http.client
import http.server
import json
import threading
import time

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.buckets import forwarded, reached_at, reply
from tvq_pod.config.settings import MetricsSettings
from tvq_pod.host import bucket_file
from tvq_pod.host.bucket_file import BucketFile
from tvq_pod.run.metrics import MetricsWriter

OFF = MetricsSettings(tensorboard=False)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(bucket_file, "UPLOAD_SECONDS", 0.02)
    monkeypatch.setattr(bucket_file, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(bucket_file, "LONGEST_PAUSE", 0.02)


class Bucket:
    """In front of the server, which joins objects without looking whether they have changed. This one wants to be told
    of which generation, and says every third time that another writer was faster. `down`: nothing works. `uploads`: the
    size of each. `files`: what is there."""

    def __init__(self, port):
        self.down, self.uploads, self.n_joined, self.n_late = False, [], 0, 0
        lock, bucket = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                with lock:
                    status, headers, content = bucket.answered(self, body)
                reply(self, status, headers, content)

            do_GET = do_PUT = do_POST = do_DELETE = answer

            def log_message(self, *args):
                pass

        self._backend = port
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def steps_in(self, path):
        return [json.loads(line)["step"] for line in self.files.cat(path).decode().splitlines()]

    def answered(self, request, body):
        if self.down:
            return 503, [], b"down"
        if "/upload/" in request.path:
            self.uploads.append(len(body))
        if "/compose" in request.path:
            self.n_joined += 1
            if "ifGenerationMatch=" not in request.path:
                return 400, [], b"whoever joins objects without looking loses what others write"
            if self.n_joined % 3 == 0:
                self.n_late += 1
                return 412, [], b"{}"
        return forwarded(request, self._backend, body)


@pytest.fixture
def bucket(server, monkeypatch):
    bucket = Bucket(server)
    bucket.files = reached_at(monkeypatch, server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{bucket.server.server_port}")
    yield bucket
    bucket.server.shutdown()


@pytest.mark.slow
def test_lines_of_two_writers_survive_each_other(bucket, quick, monkeypatch):
    """A training and an evaluation of it, which upload every line on its own."""
    monkeypatch.setattr(bucket_file, "PIECE_BYTES", 1)
    path = epath.Path("gs://bucket/two/metrics.jsonl")
    writers = [BucketFile(path) for _ in range(2)]
    for n in range(8):
        for which, writer in enumerate(writers):
            writer.write(f"{which} {n}\n".encode())
    for writer in writers:
        writer.close()
    lines = bucket.files.cat("bucket/two/metrics.jsonl").decode().splitlines()
    assert sorted(lines) == sorted(f"{which} {n}" for which in range(2) for n in range(8))
    for which in "01":
        assert [line for line in lines if line[0] == which] == [f"{which} {n}" for n in range(8)]
    assert bucket.n_late > 2
    assert bucket.files.ls("bucket/two") == ["bucket/two/metrics.jsonl"]


@pytest.mark.slow(1)
def test_an_upload_is_as_large_as_what_is_new(bucket, quick, monkeypatch):
    monkeypatch.setattr(bucket_file, "PIECE_BYTES", 10_000)
    file = BucketFile(epath.Path("gs://bucket/large/file"))
    for _ in range(3):
        for _ in range(200):
            file.write(b"x" * 99 + b"\n")
        assert file.flush(10.0)
    file.close()
    assert bucket.files.info("bucket/large/file")["size"] == 60_000
    assert max(bucket.uploads) < 10_000 + 2_000  # and what a request says about it
    assert sum(bucket.uploads) < 2 * 60_000


def test_a_bucket_that_is_down_for_a_while_loses_nothing_and_stops_nobody(bucket, quick, capfd):
    writer = MetricsWriter(epath.Path("gs://bucket/down"), OFF)
    writer.write(1, "train", dict(loss=1.0))
    assert writer.flush()
    bucket.down = True
    began = time.monotonic()
    for step in (2, 3):
        writer.write(step, "train", dict(loss=1.0))
    assert time.monotonic() - began < 0.1
    assert not writer._file.flush(0.3)
    assert bucket.steps_in("bucket/down/metrics.jsonl") == [1]
    bucket.down = False
    assert writer.flush()
    writer.close()
    assert bucket.steps_in("bucket/down/metrics.jsonl") == [1, 2, 3]
    said = capfd.readouterr().err
    assert said.count("WARNING: gs://bucket/down/metrics.jsonl can't be written") == 1
    assert "tried again" in said


def test_a_bucket_that_stays_down_does_not_hold_the_end_up(bucket, quick, monkeypatch, capfd):
    monkeypatch.setattr(bucket_file, "CLOSE_SECONDS", 0.3)
    bucket.down = True
    file = BucketFile(epath.Path("gs://bucket/never/metrics.jsonl"))
    file.write(b"12345678\n")
    began = time.monotonic()
    file.close()
    assert time.monotonic() - began < 5
    assert "gs://bucket/never/metrics.jsonl can't be written: its last 9 bytes are lost" in capfd.readouterr().err


def test_a_torn_line_in_a_bucket_does_not_spoil_the_next(bucket, quick):
    bucket.files.pipe("bucket/torn/metrics.jsonl", b'{"step": 1}\n{"step": 2, "lo')
    for step in (3, 4):
        writer = MetricsWriter(epath.Path("gs://bucket/torn"), OFF)
        writer.write(step, "train", dict(loss=1.0))
        writer.close()
    lines = bucket.files.cat("bucket/torn/metrics.jsonl").decode().splitlines()
    assert lines[:2] == ['{"step": 1}', '{"step": 2, "lo']
    assert [json.loads(line)["step"] for line in lines[2:]] == [3, 4]


def test_tensorboard_reads_the_events_of_a_run_in_a_bucket(bucket, quick, tmp_path):
    for session in ([1, 2], [2, 3]):
        writer = MetricsWriter(epath.Path("gs://bucket/events"), MetricsSettings())
        for step in session:
            writer.write(step, "train", dict(loss=step / 4, by_unit=[1.0, step], digest="ab"))
        writer.close()
    bucket.files.get("bucket/events/tensorboard/", str(tmp_path), recursive=True)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/by_unit/0", "train/by_unit/1"]
    for tag, value in (("train/loss", 0.25), ("train/by_unit/1", 1.0)):
        assert [(event.step, event.value) for event in events.Scalars(tag)] == [
            (step, value * step) for step in (1, 2, 2, 3)
        ]
    assert bucket.steps_in("bucket/events/metrics.jsonl") == [1, 2, 2, 3]
