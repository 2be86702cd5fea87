"""What a needle is hidden in: the repeated filler, random words, or real text.

A haystack is called for an exact number of tokens and answers with them and with the places where the needle may go.
It is always the *end* of a longer text: whole units (filler blocks, words, lines), preceded by the tail of one more
unit where whole ones do not fill the count. Each unit ends with its separator (a space, a newline; nothing for a
tokenizer without white space), so the text reads on after the tail and may be parted after every unit.
"""

import os
from typing import Protocol

import numpy as np
from jaxtyping import Int32, Integer

from lcr.data.sources import open_source
from lcr.data.tokenizers import RANDOM_WORDS, Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."


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

    def __init__(self, tokenizer: Tokenizer):
        self._block = tokenizer.encode(FILLER + " ")
        self._tiled = self._block

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        if count > len(self._tiled):
            self._tiled = np.tile(self._block, -(-count // len(self._block)))
        return self._tiled[len(self._tiled) - count :], unit_ends(count, len(self._block))


class RandomWords:
    """Words drawn evenly from `RANDOM_WORDS`, all of which have as many tokens; places are the ends of words."""

    def __init__(self, tokenizer: Tokenizer):
        self._words = np.stack([tokenizer.encode(word + " ") for word in RANDOM_WORDS])

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

    def __init__(self, tokenizer: Tokenizer, source: str, data_dir: str | os.PathLike | None):
        documents = open_source(source, data_dir=data_dir)
        pieces: list[bytes] = []
        size = 0
        for index in range(len(documents)):
            pieces.append(documents[index].rstrip(b"\n") + b"\n")
            size += len(pieces[-1])
            if size >= self.MAX_BYTES:
                break
        self._text = np.frombuffer(b"".join(pieces), np.uint8)
        self._line_ends = np.flatnonzero(self._text == ord("\n")) + 1
        self._tokenizer = tokenizer

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        end = int(self._line_ends[rng.integers(len(self._line_ends))])
        text = np.take(self._text, np.arange(end - count, end), mode="wrap")
        places = np.flatnonzero(text == ord("\n")) + 1
        return self._tokenizer.encode(text.tobytes()), with_start(places)


def unit_ends(count: int, unit: int) -> Integer[np.ndarray, "places"]:
    """0 and the ends of the units, as long as `unit` each, of which `count` tokens are the end."""
    return with_start(np.arange(count % unit, count + 1, unit))


def with_start(places: Integer[np.ndarray, "places"]) -> Integer[np.ndarray, "more"]:
    """The same sorted places with 0 as the first, added where it is missing."""
    return places if len(places) and places[0] == 0 else np.concatenate([np.zeros(1, places.dtype), places])
