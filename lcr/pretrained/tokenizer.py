"""The tokenizer of a checkpoint's folder, behind this project's two methods."""

import ast
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, Int32

from lcr.data.tokenizers import ByteTokenizer, Tokenizer, check_ids

logger = logging.getLogger("lcr.pretrained")

FILES = (  # what an export copies
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "generation_config.json", "chat_template.jinja",
)  # fmt: skip


class LibraryTokenizer:
    """A tokenizer.json, by the library `tokenizers`. `encode` adds no special tokens, `prompt` those that it says.

    bos: the id that begins a text, where the folder names it, else None. eos: those that end one, of which there may be
    several, as of the other tokenizers here.
    """

    name = "tokenizer.json"

    def __init__(self, folder: Path):
        from tokenizers import Tokenizer as Library

        self.folder = folder
        try:
            self._library = Library.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from None
        self.vocab_size = max(self._library.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = {kind: self._library.token_to_id(token) for kind, token in _named_tokens(folder).items()}
        ids = _named_ids(folder)
        self.bos = next(iter(_distinct(named.get("bos"), *ids["bos"])), None)
        self.eos = _distinct(named.get("eos"), *ids["eos"])

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        return np.array(self._library.encode(_text(text), add_special_tokens=False).ids, np.int32)

    def prompt(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        return np.array(self._library.encode(_text(text), add_special_tokens=True).ids, np.int32)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        check_ids(ids, self)
        return self._library.decode(ids.tolist())


class SentencePieceTokenizer:
    """A tokenizer.model, by the library `sentencepiece`."""

    name = "tokenizer.model"

    def __init__(self, folder: Path):
        from sentencepiece import SentencePieceProcessor

        self.folder = folder
        try:
            self._library = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{folder / 'tokenizer.model'}: no model of sentencepiece: {error}") from None
        self.vocab_size = self._library.vocab_size()
        bos, eos = (i if i >= 0 else None for i in (self._library.bos_id(), self._library.eos_id()))
        self.bos, self.eos = bos, _distinct(eos, *_named_ids(folder)["eos"])

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        return np.array(self._library.encode(_text(text)), np.int32)

    def prompt(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        return np.array(self._library.encode(_text(text), add_bos=self.bos is not None), np.int32)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        check_ids(ids, self)
        return self._library.decode(ids.tolist())


class RWKVTokenizer:
    """The vocabulary of RWKV ("World"): byte strings, of which the longest that fits is taken; id 0 ends a text.

    Its file (rwkv_vocab_v20230424.txt, or rwkv_vocab_*.txt) has a line for each: id, the string as a Python literal
    of text or bytes, and its length in bytes.
    """

    name = "rwkv"

    def __init__(self, path: Path):
        self.folder = path.parent
        self.tokens: dict[int, bytes] = {}
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                token_id, rest = line.split(" ", 1)
                literal, length = rest.rsplit(" ", 1)
                value = ast.literal_eval(literal)
                value = value.encode() if isinstance(value, str) else value
                if not isinstance(value, bytes) or len(value) != int(length):
                    raise ValueError(f"{literal} is not {length} bytes")
                self.tokens[int(token_id)] = value
            except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: expected an id, a literal and its length: {error}") from None
        self.ids = {value: token_id for token_id, value in self.tokens.items()}
        self.longest = max(map(len, self.ids), default=0)
        self.vocab_size = max(self.tokens, default=0) + 1
        self.bos, self.eos = None, _distinct(0, *_named_ids(path.parent)["eos"])

    def encode(self, text: str | bytes) -> Int32[np.ndarray, "T"]:
        data = text if isinstance(text, bytes) else text.encode()
        ids, at = [], 0
        while at < len(data):
            for length in range(min(self.longest, len(data) - at), 0, -1):
                if (token_id := self.ids.get(data[at : at + length])) is not None:
                    break
            else:
                raise ValueError(f"the vocabulary has no token for the byte {data[at]:#04x}")
            ids.append(token_id)
            at += length
        return np.array(ids, np.int32)

    def decode(self, ids: Int[np.ndarray, "T"]) -> str:
        check_ids(ids, self)
        return b"".join(self.tokens.get(i, b"") for i in ids.tolist()).decode("utf-8", "replace")


def load_tokenizer(path: str | os.PathLike, vocab_size: int) -> Tokenizer:
    """The tokenizer beside a checkpoint: tokenizer.json, tokenizer.model, or RWKV's vocabulary; else bytes.

    path: a folder, or a file in it. vocab_size: of the model; where it has no row for some tokens (of images, say), the
    log says so.
    Raises: ValueError for a file that cannot be read.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    tokenizer = find_tokenizer(folder) or ByteTokenizer()
    if tokenizer.vocab_size > vocab_size:
        logger.warning(
            "%s: the tokenizer (%s) has ids up to %d, its model rows for %d; higher ids have no meaning to it",
            folder, tokenizer.name, tokenizer.vocab_size - 1, vocab_size,
        )  # fmt: skip
    return tokenizer


def find_tokenizer(folder: str | os.PathLike) -> Tokenizer | None:
    """The tokenizer of a folder, None where there is none. Raises: ValueError for a file that cannot be read."""
    folder = Path(folder)
    if (folder / "tokenizer.json").exists():
        return LibraryTokenizer(folder)
    if (folder / "tokenizer.model").exists():
        return SentencePieceTokenizer(folder)
    vocabularies = sorted(folder.glob("rwkv_vocab*.txt"))
    return RWKVTokenizer(vocabularies[0]) if vocabularies else None


def _text(text: str | bytes) -> str:
    return text.decode("utf-8") if isinstance(text, bytes) else text


def _named_tokens(folder: Path) -> dict[str, str]:
    """The tokens that begin and end a text, as tokenizer_config.json names them, or else special_tokens_map.json."""
    named: dict[str, str] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        fields = _object(folder / name)
        for kind in ("bos", "eos"):
            token = fields.get(f"{kind}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                named.setdefault(kind, token)
    return named


def _named_ids(folder: Path) -> dict[str, list[int]]:
    """The ids that begin and end a text by generation_config.json, each one or a list."""
    fields = _object(folder / "generation_config.json")
    found = {}
    for kind in ("bos", "eos"):
        ids = fields.get(f"{kind}_token_id")
        found[kind] = [i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int]
    return found


def _distinct(*ids: int | None) -> tuple[int, ...]:
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, {} where there is none. Raises: ValueError for anything else."""
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: a JSON {type(fields).__name__}, expected an object")
    return fields
