"""Starts the processes that compile rows for a target, and goes on where one is ended."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from pallas_kernels.check import worker

Row = tuple[str, str, str, str | None]  # op, shape, pass, implementation (None: the default)


def compile_all(target: Any, cases: str, rows: list[Row], report: Callable[[dict[str, Any]], None]) -> None:
    """For a TPU in two rounds: only what has kernels of ours is dumped, which is slow."""
    found = compile_rows(target, cases, rows, None)
    again = []
    for row, result in found:
        if result.get("dump"):
            again.append(row)
        elif not result.get("skip"):
            report(named(target, row, result))
    if again:
        with tempfile.TemporaryDirectory() as folder:
            for row, result in compile_rows(target, cases, again, folder):
                report(named(target, row, result))


def compile_rows(target: Any, cases: str, rows: list[Row], folder: str | None) -> Iterator[tuple[Row, dict[str, Any]]]:
    """In processes of their own; where one is ended by its compiler, that row has failed and the others go on."""
    left = list(rows)
    while left:
        with tempfile.TemporaryFile() as errors:
            task = {"target": target.name, "folder": folder, "cases": cases, "rows": left}
            command = [sys.executable, "-m", "pallas_kernels.check.worker", json.dumps(task)]
            environment = os.environ | worker.environment(target, folder)
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
            for line in process.stdout:
                yield left.pop(0), json.loads(line)
            if process.wait() != 0 and left:
                errors.seek(0)
                said = errors.read().decode(errors="replace").strip()[-2000:]
                error = f"the compiler's process ended with {ending(process.returncode)}: {said}"
                yield left.pop(0), {"error": error, "seconds": 0}


def named(target: Any, row: Row, result: dict[str, Any]) -> dict[str, Any]:
    return dict(zip(("target", "op", "shape", "pass", "asked"), (target.name, *row), strict=True)) | result


def ending(code: int) -> str:
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name
