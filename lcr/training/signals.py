"""Being told to stop: the first signal asks for a clean end, the second one gets its way at once."""

import os
import signal
import threading
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The run was told to stop, has saved its last step, and can go on from there.

    signal: the number of the signal.
    """

    def __init__(self, number: int, step: int, path: str):
        self.signal = number
        self.step = step
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved in {path}; the same command goes on")


class StopSignals:
    """A context in which SIGTERM and SIGINT are remembered in `received` rather than obeyed.

    A second signal ends the process at once, as if it had no handler. Outside of the main thread, where Python
    delivers no signals, nothing is changed.
    """

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.received = number
