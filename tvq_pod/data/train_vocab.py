"""Training a SentencePiece vocabulary on a corpus's own training documents: byte-pair encoding with byte fallback, so
that tokens decode to exactly the original bytes."""

import contextlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator

import sentencepiece
from etils import epath

from tvq_pod.config.relations import check_vocab_fits
from tvq_pod.config.settings import DataSettings, Settings
from tvq_pod.data.corpora import documents
from tvq_pod.data.store import MADE_WITH, same_settings, split_of, store_path
from tvq_pod.data.text import usable
from tvq_pod.data.vocab import END_OF_DOC, PAD, UNKNOWN, SentencePieceVocab, Vocab, load_vocab
from tvq_pod.errors import UserError
from tvq_pod.host.files import write_whole
from tvq_pod.host.terminal import say
from tvq_pod.parallel.deadlines import still_working
from tvq_pod.parallel.processes import is_process_zero

TRAINED = "sentencepiece"  # the vocabulary that is made here
SAMPLE_BYTES = 200_000_000  # of lines in which pairs are counted; SentencePiece needs a few times that much memory
MAX_LINE_BYTES = 4096


def train_sentencepiece(texts: Iterable[bytes | memoryview], vocab_size: int) -> bytes:
    """Returns a model file of vocab_size pieces: 0 pad, 1 end-of-document, 2 unknown, newline, 256 bytes, and the rest.

    Nothing is normalized. Raises UserError if the texts have too few different pairs, or are empty.
    """
    model, lines = io.BytesIO(), sample(_lines(texts), SAMPLE_BYTES)
    if not lines:
        raise UserError(
            f"config.data.vocab_size={vocab_size}: there is no text to train a vocabulary on; give other text"
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            pad_id=PAD,
            eos_id=END_OF_DOC,
            unk_id=UNKNOWN,
            bos_id=-1,
            byte_fallback=True,
            character_coverage=0.9999,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=min(len(os.sched_getaffinity(0)), 64),
            minloglevel=2,
        )
    except RuntimeError as error:
        text = " ".join(str(error).split())
        most, least = re.search(r"value <= (\d+)", text), re.search(r"required_chars. \d+ vs (\d+)", text)
        right = f"at most {most[1]} here" if most else f"one that SentencePiece can train ({text[-200:]})"
        right = f"at least {least[1]} here" if least else right
        raise UserError(f"config.data.vocab_size={vocab_size}: must be {right}") from None
    return model.getvalue()


def sample(lines: Iterable[str], n_bytes: int) -> list[str]:
    """Returns all lines, or every second, fourth, ...: as many as fit into about n_bytes."""
    kept, size, stride = [], 0, 1
    for number, line in enumerate(lines):
        if number % stride:
            continue
        kept.append(line)
        size += len(line)
        if size > n_bytes:
            kept, stride = kept[::2], stride * 2
            size = sum(map(len, kept))
    return kept


def _lines(texts: Iterable[bytes | memoryview]) -> Iterator[str]:
    """Yields lines as text, without their ends and without bytes that are not UTF-8, long ones in parts."""
    for text in texts:
        at = 0
        while at < len(text):  # a mebibyte at a time: the text may be a file of any size
            block = bytes(text[at : at + 2**20])
            if at + len(block) < len(text) and b"\n" in block:
                block = block[: block.rindex(b"\n") + 1]
            at += len(block)
            for line in block.split(b"\n"):
                for begin in range(0, len(line), MAX_LINE_BYTES):
                    part = line[begin : begin + MAX_LINE_BYTES].decode("utf-8", errors="ignore")
                    part = part.replace("\u2585", "")  # SentencePiece skips lines with that
                    if part:
                        yield part


def trained_path(settings: Settings, workdir: epath.Path) -> epath.Path:
    """Returns the path of the model of config.data.vocab=sentencepiece, which is beside the store."""
    store = store_path(settings, workdir)
    return store.with_name(f"{store.name}.vocab.model")


def vocab_for(settings: Settings, workdir: epath.Path) -> Vocab:
    """Returns the vocabulary; for config.data.vocab=sentencepiece, it is trained first if it does not exist."""
    data = settings.data
    if data.vocab != TRAINED:
        return load_vocab(data.vocab)
    path = trained_path(settings, workdir)
    beside = path.with_name(f"{path.name}.json")
    made_with = {name: getattr(data, name) for name in (*MADE_WITH, "vocab_size")}
    if not path.exists() and is_process_zero():
        check_vocab_fits(settings, data.vocab_size)
        say(f"training {path}: {data.vocab_size:,} pieces, from the training documents of {data.source}")
        model = train_sentencepiece(_training_texts(data), data.vocab_size)
        with _disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(beside, json.dumps(made_with))
            write_whole(path, model)
    try:
        there = same_settings(json.loads(beside.read_text()))
    except (OSError, ValueError):
        there = {}
    for name, value in made_with.items():
        if there.get(name) != value:
            raise UserError(
                f"config.data.{name}={value}: the vocabulary {path} was trained with {there.get(name)}; give that, or "
                "another config.data.store, or remove the file"
            )
    return SentencePieceVocab(path)


def _training_texts(data: DataSettings) -> Iterator[bytes | memoryview]:
    for document in documents(data):
        still_working()
        text, _ = usable(document, any_bytes=False, data=data)
        if text is not None and len(text):
            split = document.split or split_of(text, data.validation_share, data.test_share)
            if split == "train":
                yield text


@contextlib.contextmanager
def _disk_errors(path: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"config.data.store: {path} can't be written ({error.strerror or error})") from None
