"""Making a store: on many cores, broken off and gone on with, by two at once; the result is always the same."""

import concurrent.futures
import errno
import fcntl
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import tokenizers
from etils import epath

from tests.command import ROOT
from tests.common import store_of
from tests.data.texts import TEXTS, settings_for
from tests.preparing import assert_same, preparing, undisturbed
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import encode as encode_module
from tvq_pod.data import place
from tvq_pod.data import writer as writer_module
from tvq_pod.data.build import make_store
from tvq_pod.data.encode import encoded
from tvq_pod.data.open import check_source, open_store
from tvq_pod.data.store import TokenStore
from tvq_pod.data.train_vocab import train_sentencepiece
from tvq_pod.data.vocab import ByteVocab, HuggingFaceVocab, SentencePieceVocab
from tvq_pod.errors import UserError


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "own.model"
    path.write_bytes(train_sentencepiece([text.encode() for text in TEXTS], 300))
    return SentencePieceVocab(path)


# ------------------------------------------------- many processes
@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    """Its special token is in the texts, too."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["says"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    path = tmp_path_factory.mktemp("vocab") / "tokenizer.json"
    tokenizer.save(str(path))
    return HuggingFaceVocab(path)


@pytest.mark.parametrize("kind", ["vocab", pytest.param("hugging_face", marks=pytest.mark.slow)])
def test_other_processes_give_the_same_tokens_in_the_same_order(kind, request, monkeypatch):
    vocab = request.getfixturevalue(kind)
    monkeypatch.setattr(encode_module, "ALONE_BYTES", 500)
    monkeypatch.setattr(encode_module, "BATCH_BYTES", 300)
    documents = [(n, text.encode()) for n, text in enumerate([*TEXTS, "a" * 2**20 + " b" * 2**19])]
    one, three = (
        [(tokens.document, tokens.ids.tolist(), tokens.ends) for tokens in encoded(iter(documents), vocab, n)]
        for n in (1, 3)
    )
    assert one == three
    assert [document for document, _, ends in one if ends] == [n for n, _ in documents]
    assert sum(not ends for _, _, ends in one) == 1  # of the long one


class FatalVocab(ByteVocab):
    """Kills the process that encodes a document."""

    takes_any_bytes = False
    n_vocab = 300

    def encode(self, text):
        if b"fatal" in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().encode(text)


@pytest.mark.slow(1)
def test_a_process_that_is_killed_is_an_error_in_one_line(monkeypatch):
    monkeypatch.setattr(encode_module, "ALONE_BYTES", 1)
    with pytest.raises(UserError, match=r"config.data.prepare_processes: a process that encodes text was killed"):
        list(encoded(iter([(0, b"fine"), (1, b"fatal")]), FatalVocab(), 2))


def n_taken(path) -> int:
    try:
        return json.loads((path.with_name("s.preparing") / "progress.json").read_text())["n_taken"]
    except OSError:
        return 0


def kill_after(process, path, n):
    while n_taken(path) < n:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bytes", "pieces"])
def test_a_prepare_that_is_killed_goes_on_where_it_was(corpus, tmp_path, monkeypatch, vocab, kind):
    """Three times with -9, at different documents: nothing has the final name until all is there."""
    name = "bytes"
    if kind == "pieces":
        name = tmp_path / "own.model"
        name.write_bytes(vocab.file_bytes)
    path = tmp_path / "s"
    for n in (7, 23, 41):
        kill_after(preparing(corpus, path, name, seconds=0.03), path, n)
        assert not path.exists()
    last = preparing(corpus, path, name)
    _, err = last.communicate()
    assert last.returncode == 0, err
    assert int(err.split("continues after ")[1].split()[0]) >= 41
    assert_same(TokenStore(path), undisturbed(tmp_path, monkeypatch, corpus, vocab if name != "bytes" else None))
    assert not list(tmp_path.glob("s.*"))
    assert not (path / "progress.json").exists()


@pytest.mark.slow
def test_a_corpus_that_changed_meanwhile_is_read_anew(corpus, tmp_path, monkeypatch):
    path = tmp_path / "s"
    kill_after(preparing(corpus, path, seconds=0.03), path, 20)
    (corpus / "03.txt").write_text("o" + TEXTS[3][1:])  # of the same length
    _, err = preparing(corpus, path).communicate()
    assert "has changed since" in err
    assert_same(TokenStore(path), undisturbed(tmp_path, monkeypatch, corpus, None))


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["progress", "array", "gone"])
def test_a_draft_that_is_damaged_is_made_anew(corpus, tmp_path, monkeypatch, damage):
    path, draft = tmp_path / "s", tmp_path / "s.preparing"
    kill_after(preparing(corpus, path, seconds=0.03), path, 20)
    if damage == "progress":
        text = (draft / "progress.json").read_text()
        (draft / "progress.json").write_text(text.replace('"n_taken": ', '"n_taken": 1'))
    elif damage == "array":
        shard = max((draft / "train/tokens/c").iterdir(), key=lambda file: int(file.name))  # that is read again
        content = bytearray(shard.read_bytes())
        content[5] ^= 1
        shard.write_bytes(content)
    else:
        (draft / "train/starts/zarr.json").unlink()
    process = preparing(corpus, path)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert "starting over" in err
    assert_same(TokenStore(path), undisturbed(tmp_path, monkeypatch, corpus, None))


@pytest.mark.slow
def test_two_at_once_make_one_store(corpus, tmp_path, monkeypatch):
    first = preparing(corpus, tmp_path / "s", seconds=0.03)
    while not (tmp_path / "s.preparing").exists():
        time.sleep(0.01)
    second = preparing(corpus, tmp_path / "s")
    _, err = second.communicate()
    assert first.wait() == second.returncode == 0
    assert "waiting: another process is preparing" in err
    assert_same(TokenStore(tmp_path / "s"), undisturbed(tmp_path, monkeypatch, corpus, None))


def test_of_two_at_once_the_second_may_want_another_store(corpus, tmp_path):
    settings, path = settings_for(corpus), tmp_path / "run/store"
    with place.only_one(path):
        threads = concurrent.futures.ThreadPoolExecutor(1)
        second = threads.submit(open_store, settings, epath.Path(tmp_path / "run"))
        time.sleep(0.3)
        store_of(path, [b"other"])
    with pytest.raises(UserError, match=r"config.data.source=.*corpus: the store .* was prepared with stdlib"):
        second.result()


def test_a_version_that_calls_flock_itself_and_this_one_wait_for_each_other(tmp_path, capfd):
    with (tmp_path / "s.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        threading.Timer(0.3, lambda: fcntl.flock(file, fcntl.LOCK_UN)).start()
        began = time.monotonic()
        with place.only_one(tmp_path / "s"), (tmp_path / "s.lock").open("w") as other:
            assert time.monotonic() - began >= 0.3
            assert "waiting: another process is preparing" in capfd.readouterr().err
            with pytest.raises(BlockingIOError):
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_named_and_gets_no_lock_that_outlives_its_holder(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    refused = pytest.raises(UserError, match=r"config.data.store: can't be written \(.*Function not implemented")
    with refused, place.only_one(tmp_path / "s"):
        pass


def test_a_store_that_only_lacks_its_name_is_not_made_again(tmp_path, monkeypatch):
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(UserError, match=r"config.data.store: can't be written"):
        store_of(tmp_path / "s", [b"one", b"two"])
    monkeypatch.setattr(os, "rename", rename)
    before = (tmp_path / "s.preparing/train/tokens/c/0").stat().st_mtime_ns
    assert store_of(tmp_path / "s", [b"one", b"two"]).meta["splits"]["train"]["n_documents"] == 2
    assert (tmp_path / "s/train/tokens/c/0").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.slow
def test_a_disk_that_is_full_is_named_and_what_was_written_is_not_lost(corpus, tmp_path, monkeypatch):
    path = tmp_path / "s"
    kill_after(preparing(corpus, path, seconds=0.03), path, 10)
    process = preparing(corpus, path, seconds=0.03)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (300, resource.RLIM_INFINITY))
    _, err = process.communicate()
    assert process.returncode != 0
    assert "config.data.store: can't be written" in err
    assert n_taken(path) >= 10
    assert preparing(corpus, path).wait() == 0
    assert_same(TokenStore(path), undisturbed(tmp_path, monkeypatch, corpus, None))


@pytest.mark.parametrize("target", ["an empty folder", "a mounted disk"])
def test_a_store_that_is_a_link_grows_where_the_link_leads_to(corpus, tmp_path, monkeypatch, target):
    """A disk with its file system's own folder; nothing can be renamed onto it."""
    expected = undisturbed(tmp_path, monkeypatch, corpus, None)
    disk, run = tmp_path / "disk/store", tmp_path / "run"
    disk.mkdir(parents=True)
    run.mkdir()
    (run / "store").symlink_to(disk)
    folder = disk.stat().st_ino
    rename, moved = os.rename, []
    monkeypatch.setattr(os, "rename", lambda *names: (moved.append(names), rename(*names)))
    if target == "a mounted disk":
        (disk / "lost+found").mkdir()
        monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(disk))
    assert_same(open_store(settings_for(corpus), epath.Path(run)), expected)
    assert (run / "store").is_symlink()
    assert [path.name for path in run.iterdir()] == ["store"]  # not here, which may be a small disk
    assert [path.name for path in disk.parent.iterdir()] == ["store"]
    assert (disk.stat().st_ino == folder) == (target == "a mounted disk")
    assert all(disk.parent in pathlib.Path(name).parents for names in moved[:1] for name in names)


def test_a_store_on_a_mounted_disk_is_gone_on_with_however_early_it_was_killed(corpus, tmp_path, monkeypatch):
    expected = undisturbed(tmp_path, monkeypatch, corpus, None)
    monkeypatch.setattr(os.path, "ismount", lambda path: os.fspath(path) == str(tmp_path / "disk"))
    (tmp_path / "disk").mkdir()
    with writer_module.StoreWriter(tmp_path / "disk", ByteVocab(), {}) as writer:
        writer.splits["train"].append(np.arange(9))
    settings = settings_for(corpus, store=str(tmp_path / "disk"))
    assert_same(open_store(settings, epath.Path(tmp_path)), expected)


def test_a_store_that_is_a_link_to_nothing_is_refused_in_one_line(corpus, tmp_path):
    (tmp_path / "store").symlink_to(tmp_path / "unmounted/store")
    for check in (check_source, open_store):
        with pytest.raises(
            UserError, match=r"config.data.store=.*/store: is a symbolic link to .*unmounted/store, which"
        ):
            check(settings_for(corpus), epath.Path(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "store"]


def test_an_error_before_anything_is_kept_leaves_nothing(tmp_path):
    def corpus():
        yield from ()
        raise UserError("damaged")

    with pytest.raises(UserError, match="damaged"):
        make_store(tmp_path / "s", corpus, ByteVocab(), DataSettings(source="stdlib"))
    assert list(tmp_path.iterdir()) == []


MEMORY = """
import resource, sys
import numpy as np
block = np.random.default_rng(0).bytes(2**20)
from tvq_pod.config.settings import DataSettings
from tvq_pod.data.document import Document
from tvq_pod.data.vocab import ByteVocab
from tvq_pod.data.build import make_store
corpus = lambda: (Document(str(n), block) for n in range(int(sys.argv[2])))
make_store(sys.argv[1], corpus, ByteVocab(), DataSettings(source="stdlib"))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_corpus(tmp_path):
    megabytes = []
    for n in (30, 130):
        command = [sys.executable, "-c", MEMORY, str(tmp_path / str(n)), str(n)]
        megabytes.append(int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout))
    assert megabytes[1] < megabytes[0] + 50
