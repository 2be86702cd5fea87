"""What a needle is hidden in: the repeated filler, random words, or real text.

A haystack is called for an exact number of tokens and answers with them and with the places where the needle may go.
It is always the *end* of a longer text: whole units (filler blocks, words, lines), preceded by the tail of one more
unit where whole ones do not fill the count. Each unit ends with its separator (a space, a newline; nothing for a
tokenizer without white space), so the text reads on after the tail and may be parted after every unit.
"""

from typing import Protocol

import numpy as np
from jaxtyping import Int32, Integer

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
        self.block = tokenizer.encode(FILLER + " ")
        self._tiled = self.block

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        block = len(self.block)
        if count > len(self._tiled):
            self._tiled = np.tile(self.block, -(-count // block))
        places = np.arange(count % block, count + 1, block)
        return self._tiled[len(self._tiled) - count :], with_start(places)


class RandomWords:
    """Words drawn evenly from `RANDOM_WORDS`; places are the ends of words."""

    def __init__(self, tokenizer: Tokenizer):
        words = [tokenizer.encode(word + " ") for word in RANDOM_WORDS]
        self._lengths = np.array([len(word) for word in words])
        self._words = np.zeros((len(words), self._lengths.max()), np.int32)
        for row, word in zip(self._words, words, strict=True):
            row[: len(word)] = word

    def sample(
        self, rng: np.random.Generator, count: int
    ) -> tuple[Int32[np.ndarray, "T"], Integer[np.ndarray, "places"]]:
        drawn = rng.integers(0, len(self._words), -(-count // self._lengths.min()))
        lengths = self._lengths[drawn]
        tokens = self._words[drawn][np.arange(self._words.shape[1]) < lengths[:, None]]
        ends = np.cumsum(lengths) - (len(tokens) - count)
        return tokens[len(tokens) - count :], with_start(ends[ends >= 0])


def with_start(places: Integer[np.ndarray, "places"]) -> Integer[np.ndarray, "more"]:
    """The same places with 0 as the first, added where it is missing."""
    return places if len(places) and places[0] == 0 else np.concatenate([np.zeros(1, places.dtype), places])
