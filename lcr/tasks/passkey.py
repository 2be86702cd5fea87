"""Passkey retrieval as Mohtashami and Jaggi define it (arXiv 2305.16300, and llama/run_test.py of their code).

    There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you ...
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green. ...
    The pass key is 01234. Remember it. 01234 is the pass key.
    The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. The grass is green. ...
    What is the pass key? The pass key is 01234

What differs from theirs, on purpose: the length is counted in tokens and exactly met, the haystack is made of whole
blocks (theirs is cut by the character), the key always has five digits (theirs one to five), and the needle's place
is chosen and recorded.
"""

import os
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
from jaxtyping import Float, Int

from lcr.checks import check_choice
from lcr.data.tokenizers import check_writes_any_text, make_tokenizer
from lcr.tasks.haystacks import Haystack, RandomWords, RealText, RepeatedFiller
from lcr.tasks.interface import Example

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
NEEDLE = ("The pass key is ", ". Remember it. ", " is the pass key.")  # the key stands in both gaps
QUESTION = "What is the pass key?"
ANSWER_PROMPT = "The pass key is "
DIGITS = 5


class PasskeyTask:
    """Find the five digits that were hidden in a haystack.

    tokenizer: "words" or "bytes".
    haystack:  "repeat" (the filler), "words" (random words) or "text" (lines of a corpus; tokenizer "bytes" only).
    question:  "last", or "first": before the haystack, while "The pass key is" stays at the end. Where the question
               comes first a model knows what to keep (arXiv 2402.01032).
    loss:      "answer": on the five digits that end the sample; "all": on every token but the first.
    source, data_dir: the corpus of the haystack "text", see `lcr.data.sources.open_source`.

    The pieces are joined by newlines, an empty part of the haystack left out. The space before the key belongs to the
    prompt, so that the answer is five digits, five tokens, with either tokenizer. When whole blocks do not fill the
    length, the haystack opens with the tail of one more block; the needle may stand before that tail, after it, or
    after any whole block: it is never cut, nor are the introduction and the question.
    """

    name = "passkey"
    answer_length = DIGITS
    chance: Mapping[str, float] = MappingProxyType({"exact_match": 1e-5, "digit_accuracy": 0.1})

    def __init__(
        self,
        tokenizer: str = "words",
        haystack: str = "repeat",
        question: str = "last",
        loss: str = "answer",
        source: str = "stdlib",
        data_dir: str | os.PathLike | None = None,
    ):
        check_choice("haystack", haystack, ("repeat", "words", "text"))
        check_choice("question", question, ("last", "first"))
        check_choice("loss", loss, ("answer", "all"))
        self.tokenizer = make_tokenizer(tokenizer)
        self.haystack = haystack
        self.question = question
        self.loss = loss
        encode = self.tokenizer.encode
        if question == "last":
            self._head = encode(INTRODUCTION + "\n")
            self._end = encode(QUESTION + " " + ANSWER_PROMPT)
        else:
            self._head = encode(INTRODUCTION + "\n" + QUESTION + "\n")
            self._end = encode(ANSWER_PROMPT)
        before, between, after = (encode(piece) for piece in (NEEDLE[0], NEEDLE[1], NEEDLE[2] + "\n"))
        gap = np.zeros(DIGITS, np.int32)
        self._needle = np.concatenate([before, gap, between, gap, after])
        self._first_key = len(before)
        self._second_key = len(before) + DIGITS + len(between)
        self._digits = encode("0123456789")
        self._newline = encode("\n")
        self._min_length = len(self._head) + len(self._needle) + len(self._end) + DIGITS
        if haystack == "text":
            check_writes_any_text(tokenizer, "haystack='text'")
            self._haystack: Haystack = RealText(self.tokenizer, source, data_dir)
        else:
            self._haystack = {"repeat": RepeatedFiller, "words": RandomWords}[haystack](self.tokenizer)

    def min_length(self) -> int:
        return self._min_length

    def example(self, rng: np.random.Generator, length: int, depth: float | None = None) -> Example:
        """See `Task.example`. The needle goes to the place nearest to `depth` times the haystack's tokens."""
        if length < self._min_length:
            raise ValueError(
                f"length={length} is too short for the passkey prompt with tokenizer {self.tokenizer.name!r}: "
                f"it takes at least {self._min_length} tokens, answer included"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth={depth}: expected a number from 0 (needle first) to 1 (needle last), or None")
        key = self._digits[rng.integers(0, 10, DIGITS)]
        count = length - self._min_length
        hay, places = self._haystack.sample(rng, count)
        place = int(places[rng.integers(len(places))]) if depth is None else nearest(places, depth * count)

        tokens = np.empty(length, np.int32)
        needle = len(self._head) + place
        suffix = needle + len(self._needle)
        tokens[: len(self._head)] = self._head
        tokens[len(self._head) : needle] = hay[:place]
        tokens[needle:suffix] = self._needle
        tokens[needle + self._first_key :][:DIGITS] = key
        tokens[needle + self._second_key :][:DIGITS] = key
        tokens[suffix : suffix + count - place] = hay[place:]
        if len(self._newline):  # each part of the haystack ends its line, whatever separated its units
            tokens[needle - 1] = tokens[suffix + count - place - 1] = self._newline[0]
        tokens[suffix + count - place : length - DIGITS] = self._end
        tokens[length - DIGITS :] = key

        loss_mask = np.full(length, self.loss == "all")
        loss_mask[length - DIGITS :] = True
        loss_mask[0] = False
        return Example(tokens, loss_mask, length - DIGITS, place / count if count else 0.0, needle)

    def score(
        self, predicted: Int[np.ndarray, "B P"], expected: Int[np.ndarray, "B P"]
    ) -> dict[str, Float[np.ndarray, "B"]]:
        """exact_match: 1 where all five digits are right, else 0; digit_accuracy: share of the digits that are."""
        if predicted.shape != expected.shape or predicted.shape[1:] != (DIGITS,):
            raise ValueError(
                f"predicted {predicted.shape} and expected {expected.shape}: both must be [samples, {DIGITS}]"
            )
        right = predicted == expected
        return {"exact_match": right.all(axis=1).astype(np.float64), "digit_accuracy": right.mean(axis=1)}


def nearest(places: np.ndarray, target: float) -> int:
    """The sorted place nearest to the target; of two as near, the earlier."""
    right = min(int(np.searchsorted(places, target)), len(places) - 1)
    left = max(right - 1, 0)
    return int(places[left if target - places[left] <= places[right] - target else right])
