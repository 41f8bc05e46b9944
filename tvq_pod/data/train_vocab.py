"""A SentencePiece vocabulary from a corpus' own training documents: byte-pair encoding with byte fallback, so that a
text comes back from its tokens as it was, byte for byte."""

import io
import os
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from tvq_pod.data.vocab import END_OF_DOC, PAD, UNKNOWN
from tvq_pod.errors import UserError

SAMPLE_BYTES = 200_000_000  # of lines that pairs are counted in; SentencePiece holds a few times that in memory
MAX_LINE_BYTES = 4096


def train_sentencepiece(texts: Iterable[bytes | memoryview], vocab_size: int) -> bytes:
    """The model file of vocab_size pieces: 0 pad, 1 end-of-document, 2 unknown, newline, the 256 bytes, and the rest.

    Nothing is normalized. Raises UserError if the texts have not so many different pairs, or nothing to train on.
    """
    model, lines = io.BytesIO(), sample(_lines(texts), SAMPLE_BYTES)
    if not lines:
        raise UserError(f"config.data.vocab_size={vocab_size}: there is no text to train a vocabulary on")
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
    """Of all lines, every one, or every second, fourth, ...: as many as are at most about n_bytes."""
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
    """Lines that are UTF-8, without their ends, long ones in parts."""
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
                    part = part.replace("\u2585", "")  # SentencePiece passes over lines with that
                    if part:
                        yield part
