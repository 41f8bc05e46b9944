"""Vocabularies: text to token ids and back.

Every vocabulary has the ids 0 pad, 1 end-of-document, 2 unknown, and from 3 on its own: the 256 bytes, the pieces of a
SentencePiece model, or the tokens of a Hugging Face tokenizer. The ids of a model or tokenizer that already has these
three are not shifted.

A long text is encoded in pieces to save memory. It is cut before a space followed by a word: no common tokenizer joins
the text on both sides.
"""

import codecs
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import sentencepiece
from etils import epath

from tvq_pod.errors import UserError
from tvq_pod.host.extras import require

PAD, END_OF_DOC, UNKNOWN = 0, 1, 2
N_SPECIAL = 3
MOST_UTF8_BYTES = 4  # of a character
PIECE_BYTES = 2**20  # of a text to encode at a time
SPECIAL_NAMES = (("<pad>", "[PAD]"), ("</s>", "<eos>", "<|endoftext|>", "[SEP]"), ("<unk>", "[UNK]"))
NOTHING = np.zeros([0], np.int32)
ESCAPE = "\u2581".encode()  # how SentencePiece writes a space
SPACE_AND_WORD = re.compile(rb" (?=[^\s])")


class Vocab(Protocol):
    """The interface of vocabularies.

    name: identifies it in stores and checkpoints. n_vocab: all ids are below it. takes_any_bytes: whether text need not
    be UTF-8. file_name, file_bytes: the name and content of its file; None: it has no file. offset: how much higher our
    ids are than those of that file. own_unknown: the file's id of unknown text, if any. drops_space: whether a space at
    the beginning of a piece must be dropped. can_be_cut: whether long texts may be encoded in pieces.
    """

    name: str
    n_vocab: int
    takes_any_bytes: bool
    file_bytes: bytes
    offset: int
    drops_space: bool
    can_be_cut: bool

    @property
    def own_unknown(self) -> int | None: ...

    @property
    def file_name(self) -> str | None: ...

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids, uint16 or uint32 [n], of a text or one of its `pieces`, without an end-of-document.
        Raises UnicodeDecodeError."""
        ...

    def decoder(self) -> "Decoder":
        """Returns a decoder for one stream of tokens."""
        ...


class Decoder(Protocol):
    """Turns token ids into text, one by one."""

    def decode(self, token: int, final: bool = False) -> str:
        """Returns the text that `token` completes. Special tokens have no text."""
        ...


def pieces(text: bytes | memoryview, vocab: Vocab, at_most: int | None = None) -> Iterator[bytes]:
    """Cuts a text of any length into pieces of at most at_most (PIECE_BYTES) bytes, to be encoded one by one. The cuts
    depend on `text` alone, so the tokens are always the same.

    Without a space to cut at, the cut is between two characters; but a vocabulary that would begin the next piece with
    a space of its own gets longer pieces instead.
    """
    at_most, at = at_most or PIECE_BYTES, 0
    while vocab.can_be_cut and len(text) - at > at_most:
        cut = at_most if vocab.takes_any_bytes else _cut(text, at, at_most, only_at_spaces=vocab.drops_space)
        yield bytes(text[at : at + cut])
        at += cut
        at += vocab.drops_space and text[at : at + 1] == b" "
    if at < len(text) or not at:
        yield bytes(text[at:])


def _cut(text: bytes | memoryview, at: int, at_most: int, only_at_spaces: bool) -> int:
    """Returns the length of the piece that begins at `at`: it ends before a space and a word, or else before a
    character."""
    window = bytes(text[at : at + at_most + 1])
    end = len(window)
    while (place := window.rfind(b" ", max(1, at_most // 2), end)) > 0:
        if SPACE_AND_WORD.match(window, place):
            return place
        end = place
    if only_at_spaces:
        found = SPACE_AND_WORD.search(text, at + at_most)
        return (found.start() if found else len(text)) - at
    place = at_most
    while place > 1 and window[place] & 0xC0 == 0x80:
        place -= 1
    return place


class ByteVocab:
    """A vocabulary of one token per byte."""

    name = "bytes"
    n_vocab = N_SPECIAL + 256
    takes_any_bytes = True
    file_name = None
    file_bytes = b""
    offset = N_SPECIAL
    own_unknown = None
    drops_space = False
    can_be_cut = True

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids, uint16 [number of bytes], without an end-of-document."""
        return np.add(np.frombuffer(text, np.uint8), np.uint16(N_SPECIAL), dtype=np.uint16)

    def decoder(self) -> "ByteDecoder":
        """Returns a decoder for one stream of tokens."""
        return ByteDecoder()


class ByteDecoder:
    """Turns token ids into text, one by one; an incomplete UTF-8 sequence waits for its rest."""

    def __init__(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def decode(self, token: int, final: bool = False) -> str:
        """Returns the text that `token` completes. Special tokens have no text."""
        return self._utf8.decode(bytes([token - N_SPECIAL]) if token >= N_SPECIAL else b"", final)


class SentencePieceVocab:
    """A vocabulary of the pieces of a SentencePiece model.

    Raises UserError if the file is missing or not a SentencePiece model.
    """

    takes_any_bytes = False
    file_name = "vocab.model"

    def __init__(self, path: epath.PathLike):
        self.file_bytes = _read(path)
        try:
            if not self.file_bytes:
                raise RuntimeError("empty")
            self._pieces = sentencepiece.SentencePieceProcessor(model_proto=self.file_bytes)
        except RuntimeError:
            raise UserError(f"config.data.vocab={path}: the file is not a SentencePiece model") from None
        pieces = self._pieces
        same_ids = (pieces.pad_id(), pieces.eos_id(), pieces.unk_id()) == (PAD, END_OF_DOC, UNKNOWN)
        self.offset = 0 if same_ids else N_SPECIAL
        self.n_vocab = pieces.vocab_size() + self.offset
        self.name = f"sentencepiece:{hashlib.sha256(self.file_bytes).hexdigest()[:16]}"
        starts_with_space = [pieces.encode(text, out_type=str)[0][0] == ESCAPE.decode() for text in ("a", " a")]
        self.drops_space = starts_with_space[0]  # it adds a space to the beginning of every text
        self.can_be_cut = starts_with_space[1]  # otherwise it removes spaces
        in_bytes = [pieces.piece_to_id(f"<0x{byte:02X}>") for byte in ESCAPE]
        self._escape = None if pieces.unk_id() in in_bytes or self.drops_space else in_bytes

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids, uint32 [number of pieces], without an end-of-document. Raises UnicodeDecodeError."""
        if ESCAPE in text and self._escape:
            # The text has the character that SentencePiece writes for a space: encoded as bytes, it survives.
            parts = [self._pieces.encode(part.decode("utf-8")) for part in text.split(ESCAPE)]
            encoded = parts[0] + [id_ for part in parts[1:] for id_ in self._escape + part]
        else:
            encoded = self._pieces.encode(text.decode("utf-8"))
        ids = np.asarray(encoded, np.uint32)
        unknown = ids == self._pieces.unk_id()
        return np.where(unknown, np.uint32(UNKNOWN), ids + np.uint32(self.offset))

    def decoder(self) -> "PieceDecoder":
        """Returns a decoder for one stream of tokens."""
        return PieceDecoder(self._pieces.decode, self.offset)

    @property
    def own_unknown(self) -> int:
        return self._pieces.unk_id()


class HuggingFaceVocab:
    """A vocabulary of the tokens of a `tokenizers` file (tokenizer.json); special tokens in text are plain text.

    Raises UserError if the file is missing or not a tokenizer, or the package is not installed.
    """

    takes_any_bytes = False
    file_name = "vocab.json"
    drops_space = False

    def __init__(self, path: epath.PathLike):
        self.file_bytes = _read(path)
        self._open(path)

    def _open(self, path: epath.PathLike) -> None:
        require("tokenizers", f"config.data.vocab={path}: a Hugging Face tokenizer")
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(self.file_bytes)
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"config.data.vocab={path}: the file is not a Hugging Face tokenizer ({str(error)[:100]})"
            ) from None
        tokenizer = self._tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True
        ids = tokenizer.get_vocab(with_added_tokens=True)
        same_ids = all(tokenizer.id_to_token(id_) in names for id_, names in enumerate(SPECIAL_NAMES))
        self.offset = 0 if same_ids else N_SPECIAL
        self.own_unknown = next((ids[name] for name in SPECIAL_NAMES[UNKNOWN] if name in ids), None)
        self.n_vocab = max(ids.values()) + 1 + self.offset
        self.name = f"tokenizers:{hashlib.sha256(self.file_bytes).hexdigest()[:16]}"
        try:
            parts = [self._ids(text) for text in ("the first word", " and", " two more")]
            self.can_be_cut = self._ids("the first word and two more") == [id_ for part in parts for id_ in part]
        except UserError:  # it can't encode these words, so how it treats others is unknown
            self.can_be_cut = False

    def __getstate__(self) -> bytes:
        return self.file_bytes  # the library's own pickle loses encode_special_tokens

    def __setstate__(self, file_bytes: bytes) -> None:
        self.file_bytes = file_bytes
        self._open("the tokenizer")

    def _ids(self, text: str) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library raises nothing narrower
            raise UserError(
                f"config.data.vocab: the tokenizer can't encode {text[:20]!r}... ({str(error)[:100]}); "
                "give one that can encode any text, such as byte-level BPE"
            ) from None

    def encode(self, text: bytes) -> np.ndarray:
        """Returns the token ids, uint32 [n], without an end-of-document. Raises UnicodeDecodeError, or UserError if the
        tokenizer can't encode the text."""
        ids = np.asarray(self._ids(text.decode("utf-8")), np.uint32)
        unknown = np.zeros(ids.shape, bool) if self.own_unknown is None else ids == self.own_unknown
        shifted = ids + np.uint32(self.offset)
        # A text may contain what the tokenizer encodes as pad or end-of-document, ids that are reserved here.
        return np.where(unknown | (shifted < N_SPECIAL), np.uint32(UNKNOWN), shifted)

    def decoder(self) -> "PieceDecoder":
        """Returns a decoder for one stream of tokens."""
        return PieceDecoder(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=False), self.offset)


class PieceDecoder:
    """Turns token ids into text, one by one. Keeps only the pieces since the last complete character."""

    def __init__(self, to_text: Callable[[list[int]], str], offset: int):
        """to_text: decodes the vocabulary's own ids, which are `offset` lower than ours."""
        self._to_text, self._offset = to_text, offset
        self._recent: list[int] = []
        self._printed = ""

    def decode(self, token: int, final: bool = False) -> str:
        """Returns the text that `token` completes. Special tokens have no text."""
        if token >= N_SPECIAL:
            self._recent.append(token - self._offset)
        text = self._to_text(self._recent)
        if text.endswith("\ufffd") and not final:  # in the middle of a character made of byte pieces
            return ""
        new = text[len(self._printed) :]
        # The last piece stays as context: a space before a word is decoded only if something precedes it.
        self._recent = self._recent[-1:]
        self._printed = self._to_text(self._recent)
        return new


def decoder_after(before: np.ndarray, vocab: Vocab) -> Decoder:
    """Returns a decoder for the text after the tokens `before`, integers [n], on which a first space depends."""
    decoder = vocab.decoder()
    for token in before[-MOST_UTF8_BYTES:].tolist():  # the last character may be this many tokens
        decoder.decode(token)
    return decoder


def load_vocab(name: epath.PathLike) -> Vocab:
    """Loads a vocabulary by name: "bytes", or the path of a SentencePiece model or a Hugging Face tokenizer (.json)."""
    if str(name) == ByteVocab.name:
        return ByteVocab()
    return HuggingFaceVocab(name) if str(name).endswith(".json") else SentencePieceVocab(name)


def kept_vocab(folder: epath.Path) -> Vocab:
    """Loads the vocabulary whose file is in the folder of a store or run; bytes if there is no such file."""
    for kind in (SentencePieceVocab, HuggingFaceVocab):
        if (folder / kind.file_name).exists():
            return kind(folder / kind.file_name)
    return ByteVocab()


def keep_vocab(vocab: Vocab, folder: epath.Path) -> None:
    """Writes a vocabulary's file into a folder, unless it already exists: others may be reading it."""
    if vocab.file_name and not _has(path := folder / vocab.file_name, vocab.file_bytes):
        path.write_bytes(vocab.file_bytes)


def _has(path: epath.Path, content: bytes) -> bool:
    try:
        return path.read_bytes() == content
    except OSError:
        return False


def _read(path: epath.PathLike) -> bytes:
    try:
        return epath.Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"config.data.vocab={path}: must be 'bytes', 'sentencepiece', a SentencePiece model or a Hugging Face "
            f"tokenizer.json ({error.strerror})"
        ) from None


def decoded(tokens: np.ndarray, vocab: Vocab, before: np.ndarray = NOTHING) -> str:
    """Returns the text of token ids [n] that follow others, `before`; anything that is not text becomes U+FFFD."""
    decoder = decoder_after(before, vocab)
    parts = [decoder.decode(int(token)) for token in tokens]
    return "".join(itertools.chain(parts, [decoder.decode(PAD, final=True)]))
