"""Compiles every op at its real shapes for devices that are not there, and says what the compilers said.

    python -m pallas_kernels.check --target=h100,h200,a100,b200,v5e,v5p,v6e     all rows: over an hour on two cores
    python -m pallas_kernels.check --target=h200 --ops=attention --quick        a few
    python -m pallas_kernels.check --run                                        the conformance suites on this device
    python -m pallas_kernels.check --rivals --target=v5e,v6e                    static cycles beside JAX's own kernels

A row is one op at one shape, forward or forward and backward, by the implementation that is the default on the target,
one more by the kernels of ours where they are not the default but support the call, and on TPUs one by the recurrences'
chunked form, to be compared with. Its columns: the kernels of ours in it (none where XLA or cuDNN does it all); of GPU
kernels the registers of a thread, bytes spilled, bytes of shared memory (of the kernel that asks for most), and matrix
instructions of Hopper in the code (where nvidia-cuda-nvdisasm is installed); of TPU kernels the registers spilled,
bytes of VMEM, the bundles of a grid step with its loops as often as they turn (where that hangs on the data: loops
once, and after ">" the bundles of each), and the share of them that starts a matrix product; on TPUs XLA's own estimate
of the cycles of all that is no kernel, and for a chunked form the cycles that its matrix products take at the chip's
peak; bytes of arguments, results and temporaries; seconds to compile.

The compilers come with `pip install -e .[check]`.

Exit codes: 0 all compiled (or all is right), no kernel spills; 1 not so; 2 a mistake in the command, or no compiler.
"""

import concurrent.futures
import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import app, flags

from pallas_kernels import targets
from pallas_kernels.check.processes import Row, compile_all
from pallas_kernels.commands import fail, parse, versions

TARGET = flags.DEFINE_list("target", None, f"Some of {', '.join(targets.TARGETS)}; all, if not given.")
OPS = flags.DEFINE_list("ops", None, "Some of the ops; all, if not given.")
SHAPES = flags.DEFINE_list("shapes", None, "Some of the shapes' names; all, if not given.")
QUICK = flags.DEFINE_bool("quick", False, "One or two shapes of each op, forward alone.")
OUT = flags.DEFINE_string("out", None, "A JSON file for the rows, with versions and date.")
CASES = flags.DEFINE_string("cases", "pallas_kernels.check.cases", "The module whose OPS are compiled.")
JOBS = flags.DEFINE_integer("jobs", os.cpu_count(), "Targets that are compiled for at a time.", lower_bound=1)
RUN = flags.DEFINE_bool("run", False, "Run the ops' conformance suites on this machine's device instead.")
RIVALS = flags.DEFINE_bool("rivals", False, "Count static cycles beside JAX's own TPU kernels instead.")

COLUMNS = (
    "target", "op", "shape", "pass", "by", "kernels", "registers", "spills", "shared memory or VMEM", "bundles a step",
    "products", "XLA's cycles (floor)", "memory, MB", "s",
)  # fmt: skip
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        fail(f"unexpected argument {argv[1]!r}: every argument is a flag, --name=value; see --help")
    if RUN.value:
        from pallas_kernels.check import device

        names = OPS.value or list(device.OPS)
        for name in names:
            if name not in device.OPS:
                fail(targets.nearest("op", name, device.OPS))
        sys.exit(device.run(names, QUICK.value))
    default = ("v5e", "v6e") if RIVALS.value else tuple(targets.TARGETS)
    try:
        chosen = [targets.find(name) for name in TARGET.value or default]
        for target in chosen:
            targets.check_compilers(target)
        rows = {target.name: select_rows(target) for target in chosen}
        if not RIVALS.value and not any(rows.values()):
            raise ValueError("--ops and --shapes: none of the ops has one of the shapes")
    except (ValueError, targets.MissingCompiler) as error:
        fail(str(error))
    if OUT.value and not Path(OUT.value).parent.is_dir():
        fail(f"--out={OUT.value}: its folder does not exist; make it first")
    if RIVALS.value:
        if others := [target.name for target in chosen if target.platform != "tpu"]:
            fail(f"--rivals: cycles are known of TPUs alone, and {', '.join(others)} is none: give --target=v5e,v6e")
        from pallas_kernels.check.rivals import compare

        sys.exit(compare(chosen, QUICK.value, OUT.value))
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    done: list[dict[str, Any]] = []
    lock = threading.Lock()

    def report(row: dict[str, Any]) -> None:
        with lock:
            done.append(row)
            print(f"| {' | '.join(cells(row))} |", flush=True)

    with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
        list(pool.map(lambda target: compile_all(target, CASES.value, rows[target.name], report), chosen))
    if OUT.value:
        order = [target.name for target in chosen]
        done.sort(key=lambda row: order.index(row["target"]))
        Path(OUT.value).write_text(
            json.dumps({"date": time.strftime("%Y-%m-%d"), "versions": versions(PACKAGES), "rows": done}, indent=1)
            + "\n"
        )
    bad = [f"{' '.join(identity(row))}: {problem}" for row in done if (problem := what_is_wrong(row))]
    print(f"\n{len(done)} rows, {len(bad)} of them wrong" + "".join(f"\n  {line}" for line in bad))
    sys.exit(1 if bad else 0)


def select_rows(target: Any) -> list[Row]:
    """Raises: ValueError for a name that is not known, naming the nearest."""
    cases = importlib.import_module(CASES.value)
    known = {shape for op in cases.OPS.values() for shape in op.shapes}
    for what, given, names in (("op", OPS.value, cases.OPS), ("shape", SHAPES.value, sorted(known))):
        for name in given or ():
            if name not in names:
                raise ValueError(targets.nearest(what, name, names))
    from pallas_kernels.check.cases import passes

    return [
        (name, shape, what, by)
        for name, op in cases.OPS.items()
        if OPS.value is None or name in OPS.value
        for shape in (op.quick if QUICK.value and SHAPES.value is None else op.shapes)
        if SHAPES.value is None or shape in SHAPES.value
        for what in passes(op.shapes[shape])[: 1 if QUICK.value else None]
        for by in op.forms(target.platform)
    ]


def identity(row: dict[str, Any]) -> list[str]:
    return [row[key] for key in ("target", "op", "shape", "pass")]


def what_is_wrong(row: dict[str, Any]) -> str | None:
    if "error" in row:
        return row["error"]
    spilling = [f"{name_of(kernel)} spills {spills_of(kernel)}" for kernel in row["kernels"] if spills_of(kernel)]
    return ", ".join(spilling) or None


def name_of(kernel: dict[str, Any]) -> str:
    return kernel["name"].removesuffix("_mosaic_gpu_kernel")


def spills_of(kernel: dict[str, Any]) -> int:
    return sum(kernel.get(name, 0) for name in ("spill_stores", "spill_loads", "spills", "fills"))


def bundles_of(kernel: dict[str, Any]) -> str | None:
    if kernel.get("cycles"):
        return str(kernel["cycles"])
    return " > ".join(map(str, (kernel["step"], *kernel["loops"]))) if "step" in kernel else None


def xla_cycles_of(row: dict[str, Any]) -> str:
    floor = f" ({row['floor']})" if "floor" in row else ""
    cycles = row.get("xla_cycles")
    return f"{'–' if cycles is None else cycles}{floor}"


def cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        by = f"{row['asked']}: " if row["asked"] else ""
        return (
            [*identity(row), f"{by}failed: {row['error'].splitlines()[0][:200]}"]
            + ["–"] * 8
            + [f"{row['seconds']:.1f}"]
        )

    def each(show: Callable[[dict[str, Any]], Any]) -> str:
        shown = [show(kernel) for kernel in row["kernels"]]
        return ", ".join("–" if value is None else str(value) for value in shown) or "–"

    memory = row["memory"]
    return [
        *identity(row),
        row["implementation"] or "–",
        each(name_of),
        each(lambda kernel: kernel.get("registers")),
        each(spills_of),
        each(lambda kernel: f"{kernel.get('shared_memory') or kernel.get('vmem') or 0:,}".replace(",", " ")),
        each(bundles_of),
        each(lambda kernel: f"{kernel['products']:.0%}" if "products" in kernel else kernel["hgmma"]),
        xla_cycles_of(row),
        " + ".join(f"{memory[name] / 1e6:.0f}" for name in ("argument", "output", "temp")),
        f"{row['seconds']:.1f}",
    ]


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
