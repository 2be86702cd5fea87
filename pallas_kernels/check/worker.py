"""Compiles rows for one target and says what the compiler said: the process behind `python -m pallas_kernels.check`.

A process of its own for each target, because the compilers read what they shall dump from the environment when they are
loaded, print it to the file descriptors themselves, and end the process where they fail badly. Rows come as JSON in the
first argument; each result is a line of JSON on what was the standard output.
"""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pallas_kernels import targets
from pallas_kernels.check import llo, ptxas, xla


def main(task: dict[str, Any]) -> None:
    """task: target; folder: for dumps, or null; cases: the module with OPS; rows: those of `processes.Row`.

    A dump of all that XLA makes takes minutes; without a folder, rows with kernels are given back, to be dumped.
    """
    target = targets.find(task["target"])
    results = os.fdopen(os.dup(1), "w")
    compiler = GpuCompiler() if target.platform == "gpu" else TpuCompiler(task["folder"])
    ops = importlib.import_module(task["cases"]).OPS
    for op, shape, what, by in task["rows"]:
        start = time.perf_counter()
        try:
            found = compile_row(compiler, target, ops[op], shape, what, by)
        except Exception as error:  # whatever a compiler raises: the other rows go on
            found = {"error": "".join(traceback.format_exception_only(error)).split("\n----")[0].strip()}
        print(json.dumps(found | {"seconds": round(time.perf_counter() - start, 2)}), file=results, flush=True)


def environment(target: targets.Gpu | targets.Tpu, folder: str | None) -> dict[str, str]:
    """What has to stand in the environment of the process; the package itself imports JAX."""
    dumps = ptxas.DUMPS if target.platform == "gpu" else llo.dumps(folder) if folder else {}
    # what comes out of a cache was not compiled, and the compiler says nothing about it
    return targets.environment(target) | dumps | {"JAX_ENABLE_COMPILATION_CACHE": "false"}


def compile_row(compiler: Any, target: Any, op: Any, shape: str, what: str, by: str | None) -> dict[str, Any]:
    """by: an implementation, whose row is left out where it does not support the call, or is the default; or None."""
    import jax

    from pallas_kernels.check.cases import program
    from pallas_kernels.dispatch import recording_defaults

    with targets.tracing(target):
        if by is not None:
            with recording_defaults() as defaults:
                function, arguments = program(op, op.shapes[shape], "forward")
                jax.eval_shape(function, *arguments)
            if by in (name for _, name in defaults):
                return {"skip": True}
        try:
            function, arguments = program(op, op.shapes[shape], what, by)
            if by is not None:
                jax.eval_shape(function, *arguments)
        except ValueError as error:
            if by is not None and str(error).startswith(f"implementation={by!r}"):
                return {"skip": True}
            raise
    with recording_defaults() as chosen:
        lowered = compiler.lower(lambda: targets.lower(function, arguments, target))
    if target.platform == "tpu" and compiler.folder is None and llo.CALL in lowered.as_text():
        return {"dump": True}
    compiled, kernels = compiler.compile(lowered)
    memory = compiled.memory_analysis()
    estimates = {}
    if target.platform == "tpu":
        estimates["xla_cycles"] = xla.cycles(compiled.as_text())
        if by is not None and by == op.plain:
            with targets.tracing(target):
                estimates["floor"] = round(xla.products(function, *arguments) / target.products)
    return {
        "implementation": by or " ".join(dict.fromkeys(name for _, name in chosen)),
        "kernels": kernels,
        "memory": {name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp")},
        **estimates,
    }


class GpuCompiler:
    """Keeps what was said of every kernel: the compiler says it once in a process."""

    def __init__(self):
        self.known: dict[str, ptxas.Kernel] = {}
        self.shared_memory: int | None = None

    def lower(self, lower: Callable[[], Any]) -> Any:
        with printed() as text:
            lowered = lower()
            self.shared_memory = ptxas.shared_memory(text())
        return lowered

    def compile(self, lowered: Any) -> tuple[Any, list[dict[str, Any]]]:
        with printed() as text:
            compiled = lowered.compile()
            new = ptxas.kernels(text())
        calls = ptxas.calls(compiled.as_text())
        for name, digest in calls:
            if digest not in self.known:
                same = [kernel for kernel in new if kernel.name.startswith(f"{name}_mosaic_gpu")] or new
                if not same:
                    raise RuntimeError(f"the assembler said nothing of the kernel {name}, or what it says has changed")
                self.known[digest] = same[0]
                new.remove(same[0])
        kernels = [dataclasses.asdict(self.known[digest]) for _, digest in calls]
        return compiled, [kernel | {"shared_memory": self.shared_memory} for kernel in kernels]


class TpuCompiler:
    def __init__(self, folder: str | None):
        self.folder = None if folder is None else Path(folder)

    def lower(self, lower: Callable[[], Any]) -> Any:
        with printed():
            return lower()

    def compile(self, lowered: Any) -> tuple[Any, list[dict[str, Any]]]:
        with printed():
            compiled = lowered.compile()
        if self.folder is None:
            return compiled, []
        kernels = [dataclasses.asdict(llo.kernel(name, self.folder)) for name in llo.calls(compiled.as_text())]
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return compiled, kernels


@contextlib.contextmanager
def printed() -> Iterator[Callable[[], str]]:
    """What is written to the file descriptors 1 and 2 inside, by whatever code, goes to a file; gives what reads it."""
    sys.stdout.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)

        def text() -> str:
            sys.stdout.flush()
            stream.seek(0)
            return stream.read().decode(errors="replace")

        try:
            yield text
        finally:
            sys.stdout.flush()
            for number, old in enumerate(saved, start=1):
                os.dup2(old, number)
                os.close(old)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
