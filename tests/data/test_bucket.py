"""Corpora in a bucket, gs://: a real server on loopback, and one in front of it that fails every tenth request."""

import gzip
import http.client
import http.server
import io
import json
import random
import re
import threading
import types

import gcsfs.retry
import pyarrow
import pyarrow.parquet
import pytest
from etils import epath

from tests.buckets import forwarded, reached_at, reply
from tests.command import finish, start
from tests.data.test_bad_rows import write_array_record
from tests.data.test_parts import assert_equal, contents, made
from tests.data.texts import settings_for
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import bucket, retry
from tvq_pod.data import cut as cut_module
from tvq_pod.data import document as document_module
from tvq_pod.data.append import append
from tvq_pod.data.corpora import documents, files_of
from tvq_pod.data.cut import signature
from tvq_pod.data.open import check_source, open_store
from tvq_pod.data.store import SPLITS, TokenStore
from tvq_pod.errors import UserError

ROW = '{"text": "a text"}\n'


class Unreliable:
    """Hands requests on to the server, but for every tenth, of which it fails some with 503 and breaks others off.
    down: all fail. before: called with each path. requests: all paths."""

    def __init__(self, port: int):
        self.down, self.every, self.n_failed, self.requests = False, 10, 0, []
        self.before = lambda path: None
        lock, me = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                me.before(self.path)
                with lock:
                    me.requests.append(self.path)
                    fails = me.down or len(me.requests) % me.every == 0
                    me.n_failed += fails
                    is_cut = me.n_failed % 2 == 0
                if fails and is_cut:  # the connection breaks off within the answer
                    self.send_response(200)
                    self.send_header("Content-Length", "1000000")
                    self.end_headers()
                    self.wfile.write(b"half of")
                    self.close_connection = True
                    return
                reply(self, *((503, [], b"try again") if fails else forwarded(self, port, body)))

            do_GET = answer

            def log_message(self, format, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def unreliable(server, monkeypatch):
    """The server in front; `files` writes past it."""
    front = Unreliable(server)
    front.files = reached_at(monkeypatch, server)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{front.server.server_port}")
    random_pause = gcsfs.retry.asyncio.sleep
    quick = types.SimpleNamespace(sleep=lambda seconds: random_pause(seconds / 1000))
    monkeypatch.setattr(gcsfs.retry, "asyncio", quick)
    monkeypatch.setattr(retry, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(retry, "LONGEST_PAUSE", 0.02)
    bucket.filesystem.cache_clear()
    yield front
    bucket.filesystem.cache_clear()
    front.server.shutdown()
    front.server.server_close()


@pytest.fixture
def put(unreliable, request):
    """Writes objects below a folder of their own, and returns its path."""
    folder = "bucket/" + re.sub(r"\W", "_", request.node.name)

    def put(**objects) -> str:
        unreliable.files.pipe({
            f"{folder}/{name}": content.encode() if isinstance(content, str) else content
            for name, content in objects.items()
        })  # fmt: skip
        return f"gs://{folder}"

    return put


def found(source, **settings) -> list[tuple]:
    data = DataSettings(source=str(source), **dict(holdout="hash") | settings)
    return [(document.name, bytes(document.text).decode(), document.split) for document in documents(data)]


def texts(source, **settings) -> list[str]:
    return [text for _, text, _ in found(source, **settings)]


def said(source, **settings) -> str:
    return "\n".join(files_of(DataSettings(source=str(source), **settings)).lines())


# ------------------------------------------------- which objects
def test_a_folder_of_a_bucket_is_read_by_the_rules_of_a_local_one(put, tmp_path):
    objects = {
        "a.txt": "a", "b/c.txt": "c", "b.d/e.md": "e", "b/pic.PNG": "x", ".git/config": "x", ".DS_Store": "x",
        "lost+found/x": "x", "drafts/f.txt": "f", "run/config.json": "{}", "run/checkpoints/10/x": "x",
        "old/train/c": "x", "old/store.json": "{}", "deep/er/z": "z", "x.log": "l", "deep.txt": "d",
    }  # fmt: skip
    where = put(**objects)
    for name, text in objects.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for settings in (
        dict(), dict(exclude="drafts,*.log"), dict(glob="**/*.txt"), dict(hidden=True), dict(exclude="b/*"),
    ):  # fmt: skip
        assert found(where, **settings) == found(tmp_path, **settings)
        assert said(where, **settings) == said(tmp_path, **settings)
    with pytest.raises(UserError, match=r"gs://.*/old: is a store or a run of this program"):
        texts(f"{where}/old")


@pytest.mark.slow(1)
def test_objects_folders_and_globs_stand_in_lists_with_local_paths(put, tmp_path):
    where = put(**{"x/1.txt": "1", "x/2.txt": "2", "x/.3.txt": "3", "y.txt": "y", "y[1].txt": "odd", "x/d/4.txt": "4"})
    (tmp_path / "local.txt").write_text("local")
    assert texts(f"{where}/y.txt, {tmp_path}/local.txt,{where}/x") == ["y", "local", "1", "2", "4"]
    assert texts(f"{where}/x/*.txt") == ["1", "2"]
    assert texts(f"{where}/**/*.txt", exclude="2.*") == ["1", "4", "y", "odd"]
    assert texts(f"{where}/x/*.txt", hidden=True) == ["3", "1", "2"]
    assert texts(f"{where}/y[1].txt") == ["odd"]
    assert texts(f"{where}/x/1.txt,{where}/x,{where}/*.txt") == ["1", "2", "4", "y", "odd"]
    for source, message in (
        (f"{where}/nowhere", "does not exist"), (f"{where}/z*.txt", r"no file or folder matches gs://.*z\*.txt"),
        (f"{where}/y.txt,{where}/z", "z does not exist"), ("gs://nobucket/x", "does not exist"),
        ("gs://nobucket", "does not exist"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=rf"config.data.source=gs://.*{message}"):
            texts(source)


def test_splits_of_a_bucket_are_splits(put):
    where = put(**{"train/a.txt": "a", "valid/b.txt": "b", "test/c.txt": "c"})
    for source in (where, f"{where}/train,{where}/valid,{where}/test", f"{where}/*/*.txt"):
        assert {text: split for _, text, split in found(source, holdout="auto")} == dict(
            a="train", b="validation", c="test"
        )
    assert [split for _, _, split in found(f"{where}/train/a.txt", holdout="auto")] == ["train"]


@pytest.mark.slow(1)
def test_a_run_or_store_in_the_corpus_is_refused(put):
    where = put(**{"a.txt": "text"})
    for settings, workdir, message in (
        (settings_for(where), f"{where}/run", r"contains the token store gs://.*/run/store"),
        (settings_for(where, store="gs://bucket/else"), f"{where}/run", r"contains --workdir=gs://.*/run"),
    ):
        with pytest.raises(UserError, match=message):
            check_source(settings, epath.Path(workdir))
    check_source(settings_for(where, exclude="run"), epath.Path(f"{where}/run"))
    check_source(settings_for(where), epath.Path(f"{where}2/run"))


# ------------------------------------------------- what is in them
def of_many_blocks(n: int) -> list[str]:
    random.seed(0)
    return [f"row {i} {random.randbytes(200).hex()}" for i in range(n)]


def parquet_of(rows: list[str]) -> bytes:
    file = io.BytesIO()
    table = pyarrow.table(dict(id=range(len(rows)), text=rows, other=[row[::-1] for row in rows]))
    pyarrow.parquet.write_table(table, file, row_group_size=1000)
    return file.getvalue()


@pytest.mark.slow(6)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
@pytest.mark.parametrize("format", ["text", "lines", "jsonl", "parquet", "arrayrecord"])
def test_every_format_is_read_in_small_blocks_though_every_tenth_request_fails(
    put, unreliable, tmp_path, monkeypatch, format, compress
):
    monkeypatch.setattr(bucket, "HEAD_BYTES", 1000)
    monkeypatch.setattr(bucket, "BLOCK_BYTES", 30_001)
    rows = of_many_blocks(2500)
    name, content = {
        "text": ("a.txt", "\n".join(rows).encode()), "lines": ("a.txt", "\n".join(rows).encode()),
        "jsonl": ("a.json", "".join(json.dumps(dict(text=row)) + "\n" for row in rows).encode()),
        "parquet": ("a.parquet", parquet_of(rows)),
        "arrayrecord": ("a.array_record", b""),
    }[format]  # fmt: skip
    if format == "arrayrecord":
        content = write_array_record(tmp_path / name, [row.encode() for row in rows]).read_bytes()
    where = put(**{name: compress(content)})
    assert texts(f"{where}/{name}", format=format) == (["\n".join(rows)] if format == "text" else rows)
    assert unreliable.n_failed > 1


def test_what_is_big_lies_on_disk_and_not_in_memory(put, monkeypatch):
    monkeypatch.setattr(document_module, "BIG_FILE", 1000)
    where = put(**{"a.txt": "x" * 5000})
    (document,) = documents(DataSettings(source=where, holdout="hash"))
    assert isinstance(document.text, memoryview)
    assert bytes(document.text) == b"x" * 5000


def test_of_parquet_only_the_column_is_fetched(put, unreliable, monkeypatch):
    monkeypatch.setattr(bucket, "HEAD_BYTES", 1000)
    monkeypatch.setattr(bucket, "BLOCK_BYTES", 200_000)
    rows, file = of_many_blocks(300), io.BytesIO()
    wide = [random.randbytes(20_000) for _ in rows]
    pyarrow.parquet.write_table(pyarrow.table(dict(a=wide, text=rows, z=wide)), file, row_group_size=100)
    where = put(**{"a.parquet": file.getvalue()})
    got, fetch = [], bucket._Piece.__init__

    def counted(piece, of, begin, end):
        got.append(end - begin)
        fetch(piece, of, begin, end)

    monkeypatch.setattr(bucket._Piece, "__init__", counted)
    assert texts(where) == rows
    assert sum(map(len, rows)) / 2 < sum(got) < sum(map(len, rows)) + 10 * 2**16 < len(file.getvalue()) / 10


def test_many_small_objects_are_fetched_side_by_side(put, unreliable):
    """Sixteen answers that each wait for seven others could not come if one were asked for after the other."""
    where = put(**{f"{n:03d}.txt": f"text {n}" for n in range(64)})
    unreliable.every = 10**9
    together = threading.Barrier(8)
    unreliable.before = lambda path: "alt=media" in path and together.wait(20)
    assert texts(where) == [f"text {n}" for n in range(64)]
    assert sum("alt=media" in path for path in unreliable.requests) == 64


@pytest.mark.slow(3)
def test_at_most_so_many_blocks_are_held(put, unreliable, monkeypatch):
    monkeypatch.setattr(bucket, "HEAD_BYTES", 10)
    monkeypatch.setattr(bucket, "BLOCK_BYTES", 10)
    unreliable.every = 10**9
    where = put(**{f"{n:03d}.txt": "0123456789" * 30 for n in range(40)})
    read = documents(DataSettings(source=where))
    for _ in range(20):
        next(read)
        held = [len(blocks._pieces) for blocks in bucket._AHEAD.values()]
        assert len(held) <= bucket.OBJECTS_AHEAD + 1
        assert sum(held) <= len(held) + bucket.BLOCKS_AHEAD + 1
    read.close()
    assert not bucket._AHEAD


# ------------------------------------------------- what fails, and what changes
@pytest.mark.slow(1)
def test_a_bucket_that_stays_down_is_named_in_one_line(put, unreliable, monkeypatch, capfd):
    monkeypatch.setattr(retry, "RETRY_SECONDS", 0.3)
    where = put(**{"a.txt": "a", "b.txt": "b"})
    data = DataSettings(source=where, holdout="hash")
    read = documents(data)
    listed = files_of(data)
    assert next(read).name == "a.txt"
    unreliable.down = True
    for blocks in bucket._AHEAD.values():  # as if they had not been fetched before
        blocks.close()
    with pytest.raises(UserError, match=r"^config.data.source=gs://.*/b.txt: can't be read after .* of trying \("):
        next(read)
    assert capfd.readouterr().err.count("b.txt can't be read") == 1
    with pytest.raises(UserError, match=rf"^config.data.source={where}: can't be read after"):
        texts(where)
    unreliable.down = False
    assert texts(where) == ["a", "b"]
    assert len(listed.files) == 2


@pytest.mark.slow(2)
def test_a_bucket_that_is_down_for_a_while_is_waited_for(put, unreliable, capfd):
    where = put(**{"a.txt": "a" * 100, "b.txt": "b"})
    for is_listed in (False, True):
        read = documents(DataSettings(source=where)) if is_listed else None
        unreliable.down = True
        up = threading.Timer(1.0, lambda: setattr(unreliable, "down", False))
        up.start()
        found = [bytes(document.text) for document in read or documents(DataSettings(source=where))]
        assert found == [b"a" * 100, b"b"]
        up.join()
        what = f"{where}/a.txt" if is_listed else where
        assert capfd.readouterr().err.count(f"WARNING: {what} can't be read (") == 1


@pytest.mark.slow(1)
@pytest.mark.parametrize("change", ["replaced", "removed", "same size"])
def test_an_object_that_changes_after_it_was_listed_is_named_and_not_read(put, unreliable, change):
    where = put(**{"a.txt": "first", "b.txt": "second"})
    read = documents(DataSettings(source=where, holdout="hash"))
    if change == "removed":
        unreliable.files.rm_file(f"{where}/b.txt")
    else:
        put(**{"b.txt": "other!" if change == "same size" else "a longer text than before"})
    assert bytes(next(read).text) == b"first"
    with pytest.raises(UserError, match=r"^config.data.source=gs://.*/b.txt: has changed or was deleted since it was"):
        next(read)


def test_objects_that_come_while_a_corpus_is_read_are_not_in_it(put, unreliable):
    where = put(**{f"{n:03d}.txt": f"text {n}" for n in range(40)})
    read = documents(DataSettings(source=where, holdout="hash"))
    first = next(read).name
    put(**{"0015.txt": "new", "zzz.txt": "new", "000.txt": "changed, but it has been read"})
    assert [first, *(document.name for document in read)] == [f"{n:03d}.txt" for n in range(40)]


def test_an_object_that_the_bucket_decompresses_is_refused(put, unreliable):
    where = put(**{"b.txt": "b"})
    unreliable.files.pipe_file(
        f"{where}/a.txt", gzip.compress(b"text"), fixed_key_metadata=dict(content_encoding="gzip")
    )
    with pytest.raises(UserError, match=r"a.txt: is stored with Content-Encoding gzip, .*--clear-content-encoding"):
        texts(where)


# ------------------------------------------------- stores of parts
def of_parts(monkeypatch, format: str) -> dict[str, bytes]:
    """Objects of which two are cut, and the compressed one is not."""
    monkeypatch.setattr(cut_module, "PART_BYTES", 8000)
    rows = of_many_blocks(400)
    if format == "parquet":
        monkeypatch.setattr(cut_module, "PART_BYTES", 150_000)
        return {f"{n}.parquet": parquet_of(rows * times) for n, times in enumerate((8, 1, 9))}
    rows = [row[: 60 + n] for n, row in enumerate(rows)]
    ends = dict(lines="{}\n", jsonl='{{"text": "{}"}}\n')[format]
    sizes = dict(a=rows[:150], b=rows[150:155], c=rows[155:300])
    objects = {f"{name}.{format}": "".join(map(ends.format, of)).encode() for name, of in sizes.items()}
    return objects | {f"d.{format}.gz": gzip.compress("".join(map(ends.format, rows[300:])).encode())}


def put_here_too(put, folder, objects: dict[str, bytes]) -> str:
    folder.mkdir(exist_ok=True)
    for name, content in objects.items():
        (folder / name).write_bytes(content)
    return put(**objects)


@pytest.mark.slow(8)
@pytest.mark.parametrize(("format", "n_workers"), [("lines", 1), ("jsonl", 2), ("parquet", 1)])
def test_a_bucket_is_cut_into_the_parts_of_the_local_files(put, unreliable, tmp_path, monkeypatch, format, n_workers):
    monkeypatch.setattr(bucket, "HEAD_BYTES", 1000)
    monkeypatch.setattr(bucket, "BLOCK_BYTES", 7001)
    unreliable.every = 10 if n_workers == 1 else 10**9  # other processes would wait for seconds
    where = put_here_too(put, tmp_path / "corpus", of_parts(monkeypatch, format))
    there = made(where, tmp_path / "there", format=format, prepare_processes=n_workers)
    here = made(tmp_path / "corpus", tmp_path / "here", format=format)
    assert there.n_parts == here.n_parts > 3
    assert there.fingerprint == here.fingerprint
    assert_equal(contents(there), contents(here))


@pytest.mark.slow(2)
def test_objects_are_added_to_a_store_and_changed_ones_refused(put, unreliable, tmp_path, monkeypatch):
    unreliable.every = 10**9
    objects = of_parts(monkeypatch, "lines")
    where = put_here_too(put, tmp_path / "corpus", objects)
    settings = dict(format="lines", prepare_processes=1, store=str(tmp_path / "store"))
    store = made(where, tmp_path / "store", format="lines")
    assert added(where, **settings).fingerprint == store.fingerprint
    put_here_too(put, tmp_path / "corpus", {"x.lines": objects["a.lines"][::-1].strip() + b"\n"})
    now = added(where, **settings)
    assert now.n_parts > store.n_parts
    assert_equal(contents(now), contents(made(tmp_path / "corpus", tmp_path / "here", format="lines")))
    assert_equal(contents(now.as_of(store.fingerprint)), contents(store))
    # a copy of it on this machine has nothing new
    assert added(tmp_path / "corpus", **settings).fingerprint == now.fingerprint
    put(**{"b.lines": objects["b.lines"] + b"one more\n"})
    with pytest.raises(
        UserError, match=r"^config.data.source=gs://.*: b.lines had [0-9,]+ bytes when .* read it"
    ) as error:
        added(where, **settings)
    assert "\n" not in str(error.value)


def added(source, **settings) -> TokenStore:
    return append(settings_for(source, **settings), epath.Path(f"{settings['store']}.run"))


def test_a_part_is_written_again_if_an_object_is_another(put, unreliable):
    where = put(**{"a.txt": "text"})

    def signed(path) -> str:
        return signature(files_of(DataSettings(source=path)).files)

    before = signed(where)
    assert signed(where) == before
    put(**{"a.txt": "next"})
    assert signed(where) != before


# ------------------------------------------------- the program
def test_a_store_of_a_bucket_is_the_store_of_the_local_files(put, tmp_path):
    objects = {f"{n}.jsonl": "".join(json.dumps(dict(text=f"{n} {i}" * 9)) + "\n" for i in range(50)) for n in range(9)}
    where = put(**objects)
    (tmp_path / "corpus").mkdir()
    for name, text in objects.items():
        (tmp_path / "corpus" / name).write_text(text)
    one = open_store(settings_for(where), epath.Path(tmp_path / "one"))
    two = open_store(settings_for(tmp_path / "corpus"), epath.Path(tmp_path / "two"))
    assert one.fingerprint == two.fingerprint
    assert sum(one.meta["splits"][split]["n_documents"] for split in SPLITS) == 450


@pytest.mark.slow
def test_the_program_prepares_from_a_bucket_and_refuses_one_that_is_not_there(put, tmp_path):
    where = put(**{f"{n}.txt": f"text {n} " * 50 for n in range(30)})
    flags = ["--mode=prepare", "--config=configs/stdlib.py", f"--workdir={tmp_path}/run"]
    code, _, err = finish(start(*flags, f"--source={where}"))
    assert code == 0, err
    assert "reads 30 files as text" in err
    code, out, err = finish(start(*flags, "--source=gs://nobucket/x", "--config.data.store=other"))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "config.data.source=gs://nobucket/x: does not exist" in err
