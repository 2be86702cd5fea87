"""How far a run is, on stderr: a bar on a terminal, plain lines elsewhere."""

import time
from typing import TextIO

import tqdm

from lcr.progress import Display
from lcr.training.metrics import Row


class Progress(Display):
    """Shows steps, steps/s, tokens/s, loss and time left; moves when a row is logged.

    shown: False shows nothing.
    """

    def __init__(self, steps: int, done: int, *, shown: bool = True, stream: TextIO | None = None):
        super().__init__(shown, stream)
        self._steps = steps
        self._first = self._done = done
        self._start = time.perf_counter()
        self.open_bar(total=steps, initial=done, unit="step")

    def update(self, row: Row) -> None:
        if not self._shown:
            return
        news = f"loss {row['loss']:.4f}, accuracy {row['accuracy']:.3f}, {row['tokens_per_second']:,.0f} tokens/s"
        if self._bar is not None:
            self._bar.set_postfix_str(news, refresh=False)
            self._bar.update(row["step"] - self._done)
        else:
            rate = (row["step"] - self._first) / max(time.perf_counter() - self._start, 1e-9)
            left = tqdm.tqdm.format_interval((self._steps - row["step"]) / rate)
            self.say(f"step {row['step']}/{self._steps}: {news}, {rate:.2f} steps/s, {left} left")
        self._done = row["step"]

    def compiled(self, rows: int, length: int, seconds: float) -> None:
        """Tells of a compilation, whose time says nothing about the steps to come."""
        self.say(f"compiled the step for {rows} rows of {length} tokens: {seconds:.1f} s")
        self._start += seconds
        if self._bar is not None:
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds
