"""The passkey prompt's pieces as token ids, for a tokenizer that writes a digit as one token, or for any other.

A byte or a word of the closed vocabulary is what it is wherever it stands: pieces are encoded each on its own. Most
vocabularies of published models merge letters, spaces and digits, and begin a text with marks of its own: for them
every piece is encoded behind other text, so that its tokens are those that it has in running text, and keys are drawn
until one has as many tokens as most keys have.
"""

import collections
from collections.abc import Iterable
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32

from lcr.data.tokenizers import TOKENIZERS, Tokenizer

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key?"
ANSWER_PROMPT = "The pass key is"
DIGITS = 5
PROBES = 300  # keys that are encoded to learn how many tokens most have
LEADS = ("again", "again.", "\n", "")  # texts to encode a piece behind; the first that does not melt into it is taken

Ids = Int32[np.ndarray, "_"]


@runtime_checkable
class Wording(Protocol):
    """head, end: what begins the prompt, and what ends it just before the key. newline: what the last token of a part
    of the haystack is replaced by (one token, or none). needle_length, answer_length: tokens of every needle and key.
    """

    head: Ids
    end: Ids
    newline: Ids
    needle_length: int
    answer_length: int

    def draw(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """A needle with a new key, and that key as it follows `end`."""
        ...

    def units(self, texts: Iterable[str]) -> list[Ids]:
        """Sentences or words as they follow one another."""
        ...


def make_wording(tokenizer: Tokenizer, question: str) -> Wording:
    """question: "last" or "first", see `PasskeyTask`. Raises: ValueError as `MergedWording` does."""
    return (SpelledWording if tokenizer.name in TOKENIZERS else MergedWording)(tokenizer, question)


class SpelledWording:
    """For tokenizers to which a digit is a token: units end with a space, parts with a newline in its place."""

    answer_length = DIGITS

    def __init__(self, tokenizer: Tokenizer, question: str):
        self._encode = encode = tokenizer.encode
        first = question == "first"
        self.head = encode(INTRODUCTION + "\n" + (QUESTION + "\n" if first else ""))
        self.end = encode(("" if first else QUESTION + " ") + ANSWER_PROMPT + " ")
        self.newline = encode("\n")
        before, between, after = (encode(piece) for piece in (NEEDLE + "\n").split("{key}"))
        gap = np.zeros(DIGITS, np.int32)
        self._needle = np.concatenate([before, gap, between, gap, after])
        self._places = len(before), len(before) + DIGITS + len(between)
        self.needle_length = len(self._needle)
        self._digits = encode("0123456789")

    def draw(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        key, needle = self._digits[rng.integers(0, 10, DIGITS)], self._needle.copy()
        for place in self._places:
            needle[place : place + DIGITS] = key
        return needle, key

    def units(self, texts: Iterable[str]) -> list[Ids]:
        return [self._encode(text + " ") for text in texts]


class MergedWording:
    """For any tokenizer: units begin with a space, needle and end with a newline.

    The space before the key belongs to the prompt where the tokenizer keeps it apart from digits, else to the key's
    first token.
    Raises: ValueError for a tokenizer that does not keep the key's tokens apart from what stands before them.
    """

    newline = np.zeros(0, np.int32)

    def __init__(self, tokenizer: Tokenizer, question: str):
        self._encode = tokenizer.encode
        first = question == "first"
        head = INTRODUCTION + "\n" + (QUESTION + "\n" if first else "")
        self.head = getattr(tokenizer, "prompt", tokenizer.encode)(head)
        self._asked = "\n" + ("" if first else QUESTION + " ") + ANSWER_PROMPT
        rng = np.random.default_rng(0)
        probes = [_spell(rng) for _ in range(PROBES)]
        for end in (self._asked + " ", self._asked):
            self.end = self._behind(end)
            lengths = collections.Counter(
                (len(needle), len(key)) for needle, key in map(self._keyed, probes) if key is not None and len(key)
            )
            if lengths.total() >= PROBES / 2:
                break
        else:
            raise ValueError(
                f"tokenizer {tokenizer.name!r} merges a key's digits with the words before them; expected one whose "
                f"tokens of {ANSWER_PROMPT + ' 01234'!r} begin with those of {ANSWER_PROMPT!r}"
            )
        self.needle_length, self.answer_length = lengths.most_common(1)[0][0]

    def draw(self, rng: np.random.Generator) -> tuple[Ids, Ids]:
        while True:
            needle, key = self._keyed(_spell(rng))
            if key is not None and (len(needle), len(key)) == (self.needle_length, self.answer_length):
                return needle, key

    def units(self, texts: Iterable[str]) -> list[Ids]:
        return [self._behind(" " + text) for text in texts]

    def _keyed(self, key: str) -> tuple[Ids, Ids | None]:
        """The needle, and the key's tokens after `end`; None where they are not apart."""
        asked = self._behind(f"{self._asked} {key}")
        apart = np.array_equal(asked[: len(self.end)], self.end)
        return self._behind("\n" + NEEDLE.format(key=key) + "\n"), asked[len(self.end) :] if apart else None

    def _behind(self, text: str) -> Ids:
        """The tokens of a text that follows another."""
        for lead in LEADS:
            before, both = self._encode(lead), self._encode(lead + text)
            if np.array_equal(both[: len(before)], before):
                return both[len(before) :]
        raise AssertionError("the empty text is a part of every text")


def _spell(rng: np.random.Generator) -> str:
    return "".join(map(str, rng.integers(0, 10, DIGITS)))
