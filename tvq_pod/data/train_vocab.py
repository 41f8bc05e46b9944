"""A SentencePiece vocabulary from a corpus' own training documents: byte-pair encoding with byte fallback, so that a
text comes back from its tokens as it was, byte for byte."""

import io
import os
import re
from collections.abc import Iterable, Iterator

import sentencepiece

from tvq_pod.data.vocab import END_OF_DOC, PAD, UNKNOWN
from tvq_pod.errors import UserError

MAX_LINES = 4_000_000  # that pairs are counted in, drawn from all
MAX_LINE_BYTES = 4096


def train_sentencepiece(texts: Iterable[bytes | memoryview], vocab_size: int) -> bytes:
    """The model file of vocab_size pieces: 0 pad, 1 end-of-document, 2 unknown, newline, the 256 bytes, and the rest.

    Nothing is normalized. Raises UserError if the texts have not so many different pairs, or nothing to train on.
    """
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
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
            input_sentence_size=MAX_LINES,
            shuffle_input_sentence=True,
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=min(len(os.sched_getaffinity(0)), 64),
            minloglevel=2,
        )
    except RuntimeError as error:
        text = " ".join(str(error).split())
        limit = re.search(r"value <= (\d+)", text)
        right = f"at most {limit[1]} here" if limit else f"one that SentencePiece can train ({text[-200:]})"
        raise UserError(f"config.data.vocab_size={vocab_size}: must be {right}") from None
    return model.getvalue()


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
                    if part:
                        yield part
