"""How far an evaluation is, on stderr: a bar on a terminal, a plain line now and then elsewhere."""

import time
from typing import TextIO

import tqdm

from lcr.evaluation.tables import write_length, write_rate
from lcr.progress import Display

EVERY = 10.0  # seconds between plain lines


class EvaluationProgress(Display):
    """Shows the length in hand, prompt tokens read, tokens/s and time left.

    name: of what is evaluated. shown: False shows nothing.
    """

    def __init__(self, name: str, *, shown: bool = True, stream: TextIO | None = None):
        super().__init__(shown, stream)
        self._name = name
        self._total = self._done = 0
        self._start = self._last = time.perf_counter()

    def start(self, cells: int, tokens: int) -> None:
        if not cells:
            self.say(f"{self._name}: every cell is there already")
            return
        self.say(f"{self._name}: {cells} cells to do, {tokens:,} prompt tokens")
        self._total = tokens
        self._start = self._last = time.perf_counter()
        self.open_bar(total=tokens, unit=" tokens", unit_scale=True, desc=self._name)

    def compiled(self, seconds: float) -> None:
        """Takes the seconds spent compiling out of rate and time left, and tells of them if they were many."""
        self._start += seconds
        self._last = time.perf_counter()
        if self._bar is not None:
            self._bar.start_t += seconds
        if seconds > 1:
            self.say(f"{self._name}: compiled for {seconds:.1f} s")

    def read(self, length: int, tokens: int) -> None:
        self._done += tokens
        if self._bar is not None:
            self._bar.set_postfix_str(f"length {write_length(length)}", refresh=False)
            self._bar.update(tokens)
            return
        now = time.perf_counter()
        if self._done < self._total and now - self._last < EVERY:
            return
        self._last = now
        rate = self._done / max(now - self._start, 1e-9)
        left = tqdm.tqdm.format_interval((self._total - self._done) / rate)
        self.say(
            f"{self._name}: {self._done / self._total:.0%} of the tokens, length {write_length(length)}, "
            f"{write_rate(rate)} tokens/s, {left} left"
        )
