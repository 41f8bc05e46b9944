"""Stores that are made by other processes, to be killed, and what must come of it."""

import subprocess
import sys

import numpy as np

from tests import forked
from tests.command import ROOT
from tests.common import store_of
from tvq_pod.data import store as store_module
from tvq_pod.data.store import SPLITS, TokenStore

# ------------------------------------------------- killed, and gone on with
PROGRAM = """
import sys, time
from tvq_pod.config.settings import DataSettings
from tvq_pod.data import checked, store, writer
from tvq_pod.data.corpora import documents
from tvq_pod.data.vocab import load_vocab
from tvq_pod.data.build import make_store
from tvq_pod.data.place import only_one
source, path, vocab, seconds = sys.argv[1:]
writer.COMMIT_SECONDS, checked.BATCH_SECONDS, store.SHARD_BYTES, store.CHUNK_BYTES = 0.0, 0.0, 1024, 128
data = DataSettings(source=source, validation_share=0.2, test_share=0.1)
def corpus():
    for document in documents(data):
        time.sleep(float(seconds))
        yield document
with only_one(path):
    if not store.TokenStore.exists(path):
        make_store(path, corpus, load_vocab(vocab), data)
"""


def preparing(corpus, path, vocab="bytes", seconds=0.0) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(corpus), str(path), str(vocab), str(seconds)]
    return forked.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def undisturbed(tmp_path, monkeypatch, corpus, vocab) -> TokenStore:
    monkeypatch.setattr(store_module, "SHARD_BYTES", 1024)
    monkeypatch.setattr(store_module, "CHUNK_BYTES", 128)
    texts = [path.read_bytes() for path in sorted(corpus.iterdir())]
    return store_of(tmp_path / "undisturbed", texts, vocab, validation_share=0.2, test_share=0.1)


def assert_same(store, expected):
    assert store.fingerprint == expected.fingerprint
    for split in SPLITS:
        for name in ("tokens", "starts", "doc_bytes"):
            one, other = (getattr(each.split(split), name) for each in (store, expected))
            np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
