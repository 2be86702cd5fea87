"""What a needle is hidden in: the repeated filler, random words, or real text.

A haystack is called for an exact number of tokens and answers with them and with the places where the needle may go.
It is always the *end* of a longer text: whole units (filler blocks, words, lines), preceded by the tail of one more
unit where whole ones do not fill the count. Each unit has its separator with it (a space, a newline; nothing for a
tokenizer without white space), so the text reads on after the tail and may be parted after every unit.
"""

import collections
import os
from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np
from jaxtyping import Int32, Integer

from lcr.data.sources import open_source
from lcr.data.tokenizers import RANDOM_WORDS, ByteTokenizer, Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


Units = Callable[[Iterable[str]], list[Int32[np.ndarray, "T"]]]  # see `Wording.units`


class Haystack(Protocol):
    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        """`count` tokens, and the sorted indices, 0 and `count` among them, before which a needle may be put.

        The tokens may be a view into a shared array: not to be written to.
        """
        ...


class RepeatedFiller:
    """The filler of Mohtashami and Jaggi (arXiv 2305.16300), over and over; places are the ends of its blocks."""

    def __init__(self, units: Units):
        (self._block,) = units([FILLER])
        self._tiled = self._block

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        if count > len(self._tiled):
            self._tiled = np.tile(self._block, -(-count // len(self._block)))
        return self._tiled[len(self._tiled) - count :], unit_ends(count, len(self._block))


class RandomWords:
    """Words drawn evenly from those of `RANDOM_WORDS` that have as many tokens as most; places are the ends of words."""

    def __init__(self, units: Units):
        words = units(RANDOM_WORDS)
        width = collections.Counter(map(len, words)).most_common(1)[0][0]
        self._words = np.stack([word for word in words if len(word) == width])

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        width = self._words.shape[1]
        tokens = self._words[rng.integers(0, len(self._words), -(-count // width))].ravel()
        return tokens[len(tokens) - count :], unit_ends(count, width)


class RealText:
    """Text of a corpus, in lines; places are the ends of lines.

    source, data_dir: see `lcr.data.sources.open_source`. Of a corpus larger than `MAX_BYTES` the first documents up
    to that size are used. The sample ends at the end of a random line; a longer one than the corpus begins again.
    """

    MAX_BYTES = 1 << 26
    MAX_TEXT = 1 << 22  # of a tokenizer that has to be asked line by line

    def __init__(self, tokenizer: Tokenizer, source: str, data_dir: str | os.PathLike | None):
        documents = open_source(source, data_dir=data_dir)
        by_the_byte = tokenizer.name == ByteTokenizer.name
        pieces: list[bytes] = []
        size, most = 0, self.MAX_BYTES if by_the_byte else self.MAX_TEXT
        for index in range(len(documents)):
            pieces.append(documents[index].rstrip(b"\n") + b"\n")
            size += len(pieces[-1])
            if size >= most:
                break
        text = b"".join(pieces)
        if by_the_byte:
            self._tokens = tokenizer.encode(text)
            self._ends = np.frombuffer(text, np.uint8) == ord("\n")
        else:
            lines = [tokenizer.encode(line.decode("utf-8", "replace")) for line in text[:most].splitlines(keepends=True)]
            self._tokens = np.concatenate(lines)
            self._ends = np.zeros(len(self._tokens), bool)
            self._ends[np.cumsum([len(line) for line in lines if len(line)]) - 1] = True
        self._line_ends = np.flatnonzero(self._ends) + 1

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        end = int(self._line_ends[rng.integers(len(self._line_ends))])
        taken = np.arange(end - count, end)
        places = np.flatnonzero(np.take(self._ends, taken, mode="wrap")) + 1
        return np.take(self._tokens, taken, mode="wrap"), with_start(places)


def unit_ends(count: int, unit: int) -> Integer[np.ndarray, "places"]:
    """0 and the ends of the units, as long as `unit` each, of which `count` tokens are the end."""
    return with_start(np.arange(count % unit, count + 1, unit))


def with_start(places: Integer[np.ndarray, "places"]) -> Integer[np.ndarray, "more"]:
    """The same sorted places with 0 as the first, added where it is missing."""
    return places if len(places) and places[0] == 0 else np.concatenate([np.zeros(1, places.dtype), places])
