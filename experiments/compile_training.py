"""Compiles a whole training step of 1.2 to 1.6 billion parameters for devices that are not there: does it fit?

    python -m experiments.compile_training --target=v5p:2x2x2,h200
    python -m experiments.compile_training --target=v5p:2x2x4 --mixers=mamba,rwkv7 --rows=8 --length=4096

For each architecture of experiments/configs/billion.py the step that the trainer makes (loss, gradients, AdamW;
bfloat16, each layer computed again backward), of shapes alone: nothing is allocated, nothing runs. A target is one
device, or a slice of TPUs, "v5p:2x2x2", over whose chips the parameters, the optimizer's state and the batch are
spread (lcr/training/sharding.py). The table has for each

    parameters    all of the model's
    by            the implementations of the ops, as they are chosen on the target
    memory        gigabytes (1e9) of a device: arguments (parameters, two moments, batch), results that do not lie in their
                  place, temporaries; and all of it out of what the device has
    s             seconds of tracing and compiling

Cost: one to two minutes of one core and 2 GB of memory a row. Rows already in the --json file, compiled from the same
command, are not compiled again: delete the file to do so. The compilers come with `pip install -e .[check]`.

Exit codes: 0 everything compiled and fits; 1 not so; 2 a mistake in the command, or no compiler.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags

from experiments.flags import fail, run

TARGET = flags.DEFINE_list("target", ["v5p:2x2x2", "h200"], "Devices, as pallas_kernels/targets.py has them, or slices.")
MIXERS = flags.DEFINE_list("mixers", None, "Some of the variants of experiments/configs/billion.py; all, if not given.")
ROWS = flags.DEFINE_integer("rows", 8, "Sequences of a batch for each device.", lower_bound=1)
LENGTH = flags.DEFINE_integer("length", 2048, "Tokens of a sequence.", lower_bound=2)
JSON = flags.DEFINE_string("json", None, "A file for the rows, with the versions of the compilers.")
JOBS = flags.DEFINE_integer("jobs", 1, "Steps compiled at a time.", lower_bound=1)

COLUMNS = ("target", "model", "parameters", "by", "arguments + results + temporaries, GB", "of", "fits", "s")
ASKED = ("target", "variant", "rows", "length")
PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-nvvm")


def main() -> None:
    from pallas_kernels import targets

    from experiments.configs.billion import MODELS

    try:
        for name in MIXERS.value or ():
            if name not in MODELS:
                raise ValueError(targets.nearest("mixer", name, MODELS))
        chosen = [targets.find(name) for name in TARGET.value]
        if not chosen:
            raise ValueError("--target=: expected one or more of " + ", ".join(targets.TARGETS))
        if JSON.value and not Path(JSON.value).parent.is_dir():
            raise ValueError(f"--json={JSON.value}: its folder does not exist; make it first")
        for target in chosen:
            targets.check_compilers(target)
    except (ValueError, targets.MissingCompiler) as error:
        fail(str(error))
    tasks = [
        {"target": target.name, "variant": variant, "rows": ROWS.value, "length": LENGTH.value}
        for target in chosen
        for variant in MIXERS.value or MODELS
    ]
    print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    rows = []
    for row in compile_all(tasks, read(JSON.value)):
        rows.append(row)
        print(f"| {' | '.join(cells(row))} |", flush=True)
    bad = [f"{row['target']} {row['variant']}: {problem}" for row in rows if (problem := what_is_wrong(row))]
    print(f"\n{len(rows)} steps, {len(bad)} of them wrong" + "".join(f"\n  {line}" for line in bad))
    sys.exit(1 if bad else 0)


def compile_all(tasks: list[dict[str, Any]], known: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Gives a row for each task, in order; those compiled are written to the file at once."""
    lock = threading.Lock()

    def one(task: dict[str, Any]) -> dict[str, Any]:
        for row in known:
            if "error" not in row and all(row[name] == task[name] for name in ASKED):
                return row
        row = task | compile_one(task)
        with lock:
            known[:] = [old for old in known if any(old[name] != task[name] for name in ASKED)] + [row]
            write(JSON.value, known)
        return row

    with concurrent.futures.ThreadPoolExecutor(JOBS.value) as pool:
        yield from pool.map(one, tasks)


def compile_one(task: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own, which a compiler may end, and whose environment JAX reads when it is imported."""
    from pallas_kernels import targets
    from pallas_kernels.check.processes import ending

    command = [sys.executable, "-m", "experiments.abstract_step", json.dumps(task)]
    environment = os.environ | targets.environment(targets.find(task["target"]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0 or not done.stdout:
        return {"error": f"the compiler's process ended with {ending(done.returncode)}: {done.stderr.strip()[-2000:]}"}
    return json.loads(done.stdout)


def read(path: str | None) -> list[dict[str, Any]]:
    return json.loads(Path(path).read_text())["rows"] if path and Path(path).exists() else []


def write(path: str | None, rows: list[dict[str, Any]]) -> None:
    from pallas_kernels.commands import versions

    if path:
        whole = Path(path).with_suffix(".tmp")  # an interruption leaves the old file, or the new one
        whole.write_text(
            json.dumps({"date": time.strftime("%Y-%m-%d"), "versions": versions(PACKAGES), "rows": rows}, indent=1) + "\n"
        )
        whole.replace(path)


def needed(row: dict[str, Any]) -> list[int]:
    """Bytes of arguments, of results that have memory of their own, and of temporaries."""
    memory = row["memory"]
    return [memory["argument"], memory["output"] - memory["alias"], memory["temp"]]


def what_is_wrong(row: dict[str, Any]) -> str | None:
    if "error" in row:
        return row["error"]
    if sum(needed(row)) > row["limit"]:
        return f"takes {sum(needed(row)) / 1e9:.1f} GB of a device's {row['limit'] / 1e9:.1f}"
    return None


def cells(row: dict[str, Any]) -> list[str]:
    head = [row["target"], row["variant"]]
    if "error" in row:
        return [*head, f"failed: {row['error'].splitlines()[0][:200]}", *["–"] * (len(COLUMNS) - 3)]
    return [
        *head,
        f"{row['parameters']:,}",
        ", ".join(row["by"]),
        " + ".join(f"{size / 1e9:.1f}" for size in needed(row)) + f" = {sum(needed(row)) / 1e9:.1f}",
        f"{row['limit'] / 1e9:.0f}",
        "no" if what_is_wrong(row) else "yes",
        f"{row['seconds']:.0f}",
    ]


if __name__ == "__main__":
    run(main)
