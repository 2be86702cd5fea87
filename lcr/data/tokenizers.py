"""Text to token ids and back: bytes, and a small closed vocabulary of words for fast runs.

In both, id 0 is padding: `encode` never produces it and `decode` drops it.
"""

import os
import re
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int, Int32

from lcr.checks import unknown_name

PADDING = 0


@runtime_checkable
class Tokenizer(Protocol):
    """`vocab_size` ids from 0; 0 is padding."""

    name: str
    vocab_size: int

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]: ...

    def decode(self, ids: Int[np.ndarray, "T"]) -> str: ...


class ByteTokenizer:
    """UTF-8 bytes: id = byte + 1, 257 ids. `decode(encode(text)) == text` for every text.

    `encode` also takes bytes as they are. `decode` writes bytes that are no UTF-8 as lone surrogates (Python's
    "surrogateescape"), and `encode` reads those back, so that any bytes survive the round trip too.
    """

    name = "bytes"
    vocab_size = 257

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        return np.frombuffer(data, np.uint8).astype(np.int32) + np.int32(1)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        check_ids(ids, self)
        ids = ids[ids != PADDING]
        return (ids - 1).astype(np.uint8).tobytes().decode("utf-8", "surrogateescape")


PROMPT_WORDS = (
    "There is an important info hidden inside a lot of irrelevant text Find it and memorize them I will quiz you "
    "about the information there The grass green sky blue sun yellow Here we go back again pass key Remember What"
).split()

RANDOM_WORDS = (  # all of four letters, none in the prompt
    "able acid aged also area army away baby ball band bank base bath bear beat bell belt best bird blow boat body "
    "bone book born both bowl bulk burn bush busy cake call calm camp card care case cash cast cell chat chip city "
    "club coal coat code cold come cook cool cope copy core cost crew crop dark data date dawn deal dear debt deep "
    "desk dial diet dirt disc dish door dose down draw drop drug dust duty each earn ease east edge else even exit "
    "face fact fair fall farm fast fear feed feel film fine fire firm fish flat flow food foot ford form fort four "
    "free fuel full fund gain game gate gear gift girl give goal gold golf good gray grow gulf"
).split()


class WordTokenizer:
    """A closed vocabulary: one id for each word, mark and digit of the passkey prompt, and for 128 other words.

    183 ids: 0 padding, 1 the unknown token (written `<unknown>`), 2-3 the marks `.` and `?`, 4-13 the digits, then
    `PROMPT_WORDS` and `RANDOM_WORDS` in their order, which is part of every checkpoint and must stay. Words are
    case-sensitive. A digit is always a token of its own: a key of five digits is five tokens. White space,
    newlines included, is not encoded; `decode` writes one space between words and none between digits or before a
    mark.
    """

    name = "words"
    unknown = 1
    entries = ("<pad>", "<unknown>", ".", "?", *"0123456789", *PROMPT_WORDS, *RANDOM_WORDS)
    vocab_size = len(entries)

    def __init__(self):
        self._ids = {entry: i for i, entry in enumerate(self.entries) if i > self.unknown}

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        pieces = re.findall(r"[^\W\d_]+|\S", text)
        return np.array([self._ids.get(piece, self.unknown) for piece in pieces], np.int32)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        check_ids(ids, self)
        text = " ".join(self.entries[i] for i in ids if i != PADDING)
        text = re.sub(r" (?=[.?])", "", text)
        return re.sub(r"(?<=\d) (?=\d)", "", text)


def check_ids(ids: Int[np.ndarray, "T"], tokenizer: Tokenizer) -> None:
    if ids.size and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        raise ValueError(
            f"ids from {ids.min()} to {ids.max()}: the {tokenizer.name!r} tokenizer has ids 0 to "
            f"{tokenizer.vocab_size - 1}"
        )


TOKENIZERS = {"bytes": ByteTokenizer, "words": WordTokenizer}


def make_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of that name, or of that folder (a checkpoint's). Raises ValueError naming the nearest known one,
    and for a folder without a tokenizer."""
    if name in TOKENIZERS:
        return TOKENIZERS[name]()
    if not os.path.isdir(name):
        raise ValueError(unknown_name("tokenizer", name, TOKENIZERS) + "; or the folder of a tokenizer")
    from lcr.pretrained.tokenizer import find_tokenizer  # which takes this file's tokenizers where there is none

    tokenizer = find_tokenizer(name)
    if tokenizer is None:
        raise ValueError(f"tokenizer={name!r}: the folder has no tokenizer.json, tokenizer.model or rwkv_vocab*.txt")
    return tokenizer


def check_writes_any_text(tokenizer: str, what: str) -> None:
    """Raises ValueError for a tokenizer with a closed vocabulary, to which most words of a real text are unknown."""
    if tokenizer == WordTokenizer.name:
        raise ValueError(f"tokenizer={tokenizer!r} knows too few words for {what}: use tokenizer='bytes'")
