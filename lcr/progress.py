"""What the progress displays of training and of evaluation share."""

import sys
from typing import TextIO

import tqdm


class Display:
    """A bar on a terminal, plain lines elsewhere, on stderr unless `stream` says otherwise.

    shown: False shows nothing.
    """

    def __init__(self, shown: bool, stream: TextIO | None):
        self._shown = shown
        self._stream = sys.stderr if stream is None else stream
        self._bar: tqdm.tqdm | None = None

    def open_bar(self, **options) -> None:
        """Starts a bar (the options are tqdm's) where there is a terminal to show it on."""
        if self._shown and self._stream.isatty():
            self._bar = tqdm.tqdm(file=self._stream, dynamic_ncols=True, **options)

    def say(self, text: str) -> None:
        """A line of its own, above the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
