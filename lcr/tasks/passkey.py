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
from lcr.data.tokenizers import Tokenizer, check_writes_any_text, make_tokenizer
from lcr.tasks.haystacks import Haystack, RandomWords, RealText, RepeatedFiller
from lcr.tasks.interface import Example
from lcr.tasks.wording import DIGITS, make_wording


class PasskeyTask:
    """Find the five digits that were hidden in a haystack.

    tokenizer: "words", "bytes", the folder of a checkpoint whose tokenizer it is, or a tokenizer.
    haystack:  "repeat" (the filler), "words" (random words) or "text" (lines of a corpus; not with "words").
    question:  "last", or "first": before the haystack, while "The pass key is" stays at the end. Where the question
               comes first a model knows what to keep (arXiv 2402.01032).
    loss:      "answer": on the key that ends the sample; "all": on every token but the first.
    source, data_dir: the corpus of the haystack "text", see `lcr.data.sources.open_source`.

    The pieces are joined by newlines, an empty part of the haystack left out. With "words" and "bytes" the space before
    the key belongs to the prompt, so that the answer is five digits, five tokens; a tokenizer of a published model may
    take fewer (`lcr.tasks.wording`). When whole blocks do not fill the length, the haystack opens with the tail of one
    more block; the needle may stand before that tail, after it, or after any whole block: it is never cut, nor are the
    introduction and the question.

    chance: of each metric, by guessing digits.
    """

    name = "passkey"

    def __init__(
        self,
        tokenizer: str | Tokenizer = "words",
        haystack: str = "repeat",
        question: str = "last",
        loss: str = "answer",
        source: str = "stdlib",
        data_dir: str | os.PathLike | None = None,
    ):
        check_choice("haystack", haystack, ("repeat", "words", "text"))
        check_choice("question", question, ("last", "first"))
        check_choice("loss", loss, ("answer", "all"))
        self.tokenizer = make_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.haystack = haystack
        self.question = question
        self.loss = loss
        if haystack == "text":
            check_writes_any_text(self.tokenizer.name, "haystack='text'")
        self._wording = wording = make_wording(self.tokenizer, question)
        self.answer_length = wording.answer_length
        self.chance: Mapping[str, float] = MappingProxyType(
            {"exact_match": 10.0**-DIGITS, "digit_accuracy": 10.0 ** (-DIGITS / self.answer_length)}
        )
        self._min_length = len(wording.head) + wording.needle_length + len(wording.end) + self.answer_length
        if haystack == "text":
            self._haystack: Haystack = RealText(self.tokenizer, source, data_dir)
        else:
            self._haystack = {"repeat": RepeatedFiller, "words": RandomWords}[haystack](wording.units)

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
        head, end, newline = self._wording.head, self._wording.end, self._wording.newline
        needle, key = self._wording.draw(rng)
        count, prompt_length = length - self._min_length, length - len(key)
        hay, places = self._haystack.sample(rng, count)
        place = int(places[rng.integers(len(places))]) if depth is None else nearest(places, depth * count)

        tokens = np.empty(length, np.int32)
        start = len(head) + place
        suffix = start + len(needle)
        tokens[: len(head)] = head
        tokens[len(head) : start] = hay[:place]
        tokens[start:suffix] = needle
        tokens[suffix : suffix + count - place] = hay[place:]
        if len(newline):  # each part of the haystack ends its line, whatever separated its units
            tokens[start - 1] = tokens[suffix + count - place - 1] = newline[0]
        tokens[suffix + count - place : prompt_length] = end
        tokens[prompt_length:] = key

        loss_mask = np.full(length, self.loss == "all")
        loss_mask[prompt_length:] = True
        loss_mask[0] = False
        return Example(tokens, loss_mask, prompt_length, place / count if count else 0.0, start)

    def score(
        self, predicted: Int[np.ndarray, "B P"], expected: Int[np.ndarray, "B P"]
    ) -> dict[str, Float[np.ndarray, "B"]]:
        """exact_match: 1 where the whole key is right, else 0; digit_accuracy: share of its tokens that are."""
        if predicted.shape != expected.shape or predicted.shape[1:] != (self.answer_length,):
            raise ValueError(
                f"predicted {predicted.shape} and expected {expected.shape}: both must be "
                f"[samples, {self.answer_length}]"
            )
        right = predicted == expected
        return {"exact_match": right.all(axis=1).astype(np.float64), "digit_accuracy": right.mean(axis=1)}


def nearest(places: np.ndarray, target: float) -> int:
    """The sorted place nearest to the target; of two as near, the earlier."""
    right = min(int(np.searchsorted(places, target)), len(places) - 1)
    left = max(right - 1, 0)
    return int(places[left if target - places[left] <= places[right] - target else right])
