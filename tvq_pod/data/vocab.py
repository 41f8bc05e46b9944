"""Vocabularies: text to token ids and back.

Ids are the same everywhere: 0 pad, 1 end-of-document, 2 unknown, and from 3 on what the vocabulary brings: the 256
bytes, or the pieces of a SentencePiece model. A SentencePiece model trained with these three ids is taken as it is.
"""

import codecs
import hashlib
import pathlib

import numpy as np
import sentencepiece

from tvq_pod.errors import UserError

PAD, END_OF_DOC, UNKNOWN = 0, 1, 2
N_SPECIAL = 3


class ByteVocab:
    """One token a byte."""

    name = "bytes"
    n_vocab = N_SPECIAL + 256
    takes_any_bytes = True

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, uint16 [number of bytes], without an end-of-document."""
        return np.frombuffer(text, np.uint8).astype(np.uint16) + N_SPECIAL

    def decoder(self) -> "ByteDecoder":
        """A decoder for one stream of tokens."""
        return ByteDecoder()


class ByteDecoder:
    """Token ids to text, one by one; an incomplete UTF-8 sequence waits for its rest."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int, final: bool = False) -> str:
        """The text that `token` completes. Special tokens have none."""
        return self._utf8.decode(bytes([token - N_SPECIAL]) if token >= N_SPECIAL else b"", final)


class SentencePieceVocab:
    """The pieces of a SentencePiece model.

    Raises UserError if the file is missing or no SentencePiece model.
    """

    takes_any_bytes = False

    def __init__(self, path: str | pathlib.Path):
        try:
            self.model = pathlib.Path(path).read_bytes()
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self.model)
        except OSError as error:
            raise UserError(
                f"config.data.vocab={path}: must be 'bytes' or a SentencePiece model ({error.strerror})"
            ) from None
        except RuntimeError:
            raise UserError(f"config.data.vocab={path}: the file is not a SentencePiece model") from None
        pieces = self._pieces
        same_ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (PAD, END_OF_DOC, UNKNOWN)
        self._offset = 0 if same_ids else N_SPECIAL
        self.n_vocab = pieces.vocab_size() + self._offset
        self.name = f"sentencepiece:{hashlib.sha256(self.model).hexdigest()[:16]}"

    def encode(self, text: bytes) -> np.ndarray:
        """Token ids, uint32 [number of pieces], without an end-of-document. Raises UnicodeDecodeError."""
        ids = np.asarray(self._pieces.encode(text.decode("utf-8")), np.uint32)
        unknown = ids == self._pieces.unk_id()
        return np.where(unknown, np.uint32(UNKNOWN), ids + np.uint32(self._offset))

    def decoder(self) -> "SentencePieceDecoder":
        """A decoder for one stream of tokens."""
        return SentencePieceDecoder(self._pieces, self._offset)


class SentencePieceDecoder:
    """Token ids to text, one by one. Keeps only the pieces since the last whole character."""

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, offset: int):
        self._pieces, self._offset = pieces, offset
        self._recent: list[int] = []
        self._printed = ""

    def decode(self, token: int, final: bool = False) -> str:
        """The text that `token` completes. Special tokens have none."""
        if token >= N_SPECIAL:
            self._recent.append(token - self._offset)
        text = self._pieces.decode(self._recent)
        if text.endswith("\ufffd") and not final:  # in the middle of a character made of byte pieces
            return ""
        new = text[len(self._printed) :]
        # The last piece stays as context: a space before a word shows only if something came before it.
        self._recent = self._recent[-1:]
        self._printed = self._pieces.decode(self._recent)
        return new


def load_vocab(name: str) -> ByteVocab | SentencePieceVocab:
    """The vocabulary of `config.data.vocab`: "bytes", or the path of a SentencePiece model."""
    return ByteVocab() if name == "bytes" else SentencePieceVocab(name)
