"""Runs in a bucket, gs://: a real server on loopback, and one in front of it that fails one request in forty."""

import http.client
import http.server
import json
import signal
import threading
import time

import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.buckets import forwarded, reached_at, reply
from tests.command import fingerprint, finish, metrics_of, run, start
from tests.data.test_parts import assert_equal, contents, made, written
from tests.data.texts import TEXTS
from tests.data.texts import settings_for as texts_settings
from tests.preparing import assert_same, preparing, undisturbed
from tvq_pod.data import cut as cut_module
from tvq_pod.data import part as part_module
from tvq_pod.data.append import append
from tvq_pod.data.open import open_store
from tvq_pod.data.store import TokenStore
from tvq_pod.run import lock as workdir

FLAGS = [
    "--config.sample.length=0",
    "--config.metrics.tensorboard=False",
    "--config.train.update_len=64",
    "--config.train.num_steps=60",
    "--config.checkpoint.every_steps=0",
    "--config.eval.at_end=False",
]


@pytest.fixture(scope="module")
def unreliable(server):
    """The port of a server that hands requests on, but for every fortieth, which it answers with 503."""
    counter, lock = [0, 0], threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with lock:
                counter[0] += 1
                fails = counter[0] % 40 == 0
                counter[1] += fails
            status, headers, content = (503, [], b"try again") if fails else forwarded(self, server, body)
            own = f":{self.server.server_address[1]}"
            reply(self, status, [(name, value.replace(f":{server}", own)) for name, value in headers], content)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = answer

        def log_message(self, format, *args):
            pass

    proxy = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=proxy.serve_forever, daemon=True).start()
    yield proxy.server_port, counter
    proxy.shutdown()


@pytest.mark.slow(40)
def test_a_run_in_a_bucket_that_fails_now_and_then_goes_on_after_a_kill_and_damage_with_the_same_bits(
    tmp_path, config_file, server, unreliable, monkeypatch
):
    flags = [f"--config={config_file}", *FLAGS]
    run(*flags, f"--workdir={tmp_path / 'local'}")
    expected, _ = run("--mode=inspect", f"--workdir={tmp_path / 'local'}")
    losses = {line["step"]: line["loss"] for line in metrics_of(tmp_path / "local", "train")}

    files, folder = reached_at(monkeypatch, server), "bucket/run/checkpoints"
    process = start(*flags, "--config.checkpoint.every_steps=5", "--workdir=gs://bucket/run")
    deadline = time.monotonic() + 100
    while not files.exists(f"{folder}/10/commit_success.txt"):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    files.invalidate_cache()
    before, newest = sorted(int(name.split("/")[-2]) for name in files.glob(f"{folder}/*/commit_success.txt"))[-2:]
    name = f"{folder}/{newest}/record/metadata"
    files.pipe(name, files.cat(name)[:-1] + b"?")
    check_refused_while_another_lives(files, *flags, "--workdir=gs://bucket/run")

    port, counter = unreliable
    reached_at(monkeypatch, port)
    _, err = run(*flags, "--config.metrics.tensorboard=True", "--workdir=gs://bucket/run")
    assert f"is set aside as {newest}.damaged" in err, err
    assert f"resumes from step {before} in" in err
    assert counter[1] > 5  # requests that failed
    reached_at(monkeypatch, server)
    files.invalidate_cache()
    assert files.exists(f"{folder}/{newest}.damaged/record/metadata")
    found, _ = run("--mode=inspect", "--workdir=gs://bucket/run")
    assert fingerprint(found) == fingerprint(expected)
    lines = [json.loads(line) for line in files.cat("bucket/run/metrics.jsonl").decode().splitlines()]
    assert {line["step"]: line["loss"] for line in lines} == losses
    assert all(line["loss"] == losses[line["step"]] for line in lines)
    files.get("bucket/run/tensorboard/", str(tmp_path / "events"), recursive=True)
    events = EventAccumulator(str(tmp_path / "events")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(before + 5, 61, 5))


def check_refused_while_another_lives(files, *flags) -> None:
    """A run is refused while another one's lock beats; the lock is deleted then, as a minute of silence would do."""
    ended = threading.Event()
    holder = dict(host="x", hostname="x", process=1, token="t")

    def live():
        beat = 0
        while not ended.wait(0.5):
            beat += 1
            files.pipe("bucket/run/lock", workdir._record(holder | dict(beat=beat)))

    thread = threading.Thread(target=live)
    thread.start()
    time.sleep(1)
    code, _, err = finish(start(*flags))
    ended.set()
    thread.join()
    assert code == 1
    assert "is in use by another process (process 1 on x)" in err
    files.rm("bucket/run/lock")


def test_a_store_of_parts_in_a_bucket_keeps_those_that_are_whole_and_is_added_to(tmp_path, server, monkeypatch):
    files = reached_at(monkeypatch, server)
    monkeypatch.setattr(cut_module, "PART_BYTES", 1500)
    (tmp_path / "lines").mkdir()
    written(tmp_path / "lines/a.txt", "lines", TEXTS[:30])
    expected = made(tmp_path / "lines", tmp_path / "local", format="lines")
    write_batch, n_written = part_module.write_batch, []

    def broken(*given):
        n_written.append(1)
        if len(n_written) == 3:
            raise KeyboardInterrupt
        return write_batch(*given)

    def made_there() -> TokenStore:
        settings = texts_settings(tmp_path / "lines", store="gs://bucket/parts", prepare_processes=1, format="lines")
        return open_store(settings, epath.Path(tmp_path / "run"))

    with monkeypatch.context() as patch:
        patch.setattr(part_module, "write_batch", broken)
        with pytest.raises(KeyboardInterrupt):
            made_there()
    assert files.exists("bucket/parts/part-00001/store.json")
    assert not files.exists("bucket/parts/store.json")
    store = made_there()
    assert store.fingerprint == expected.fingerprint
    assert_equal(contents(store), contents(expected))
    assert not files.exists("bucket/parts/progress.json")
    written(tmp_path / "lines/b.txt", "lines", TEXTS[30:40])
    settings = texts_settings(tmp_path / "lines", store="gs://bucket/parts", prepare_processes=1, format="lines")
    now = append(settings, epath.Path(tmp_path / "run"))
    assert now.n_parts > store.n_parts
    assert_equal(contents(now.as_of(store.fingerprint)), contents(expected))


@pytest.mark.slow(3)
def test_a_store_in_a_bucket_goes_on_where_it_was(corpus, tmp_path, server, monkeypatch):
    files, progress = reached_at(monkeypatch, server), "bucket/prepared/progress.json"
    process = preparing(corpus, "gs://bucket/prepared", seconds=0.05)
    while not (files.exists(progress) and json.loads(files.cat(progress))["n_taken"] >= 5):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not files.exists("bucket/prepared/store.json")
    again = preparing(corpus, "gs://bucket/prepared")
    _, err = again.communicate()
    assert again.returncode == 0, err
    assert "continues after" in err
    assert_same(TokenStore("gs://bucket/prepared"), undisturbed(tmp_path, monkeypatch, corpus, None))
    assert not files.exists(progress)
