"""Times an op's kernels on the device that is here, beside their rivals and beside what the device can do, in one run.

    python -m pallas_kernels.benchmark attention                                    8 minutes on a GPU
    python -m pallas_kernels.benchmark scan                                         the same
    python -m pallas_kernels.benchmark attention --lengths=512 --quick              anywhere

The rows go in the order of their importance; those for which the time does not suffice are named at the end, as not
run. What was measured goes to <device>-<date>.json in the part's folder, with device and versions.

Exit codes: 0 measured; 1 no row could be; 2 a mistake in the command.
"""

import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags

from pallas_kernels.benchmark import attention, scan, timing
from pallas_kernels.commands import fail, parse, versions
from pallas_kernels.targets import nearest

# name -> module with `rows(lengths, tokens of a call)`, `measure(row, peaks)`, the default LENGTHS, the folder MEASURED
# for its results, and where there is more to say of all rows `summary(rows)`
PARTS = {"attention": attention, "scan": scan}
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "libtpu",
    "nvidia-cudnn-cu13",
    "torch",
    "triton",
    "flash-linear-attention",
    "jax-linear-attention",
)

LENGTHS = flags.DEFINE_list("lengths", None, "Numbers of tokens; the part's own, if not given.")
QUICK = flags.DEFINE_bool(
    "quick", False, "The first three rows alone, one row to a call, and small products for the peak."
)
BUDGET = flags.DEFINE_float("budget", 420, "Seconds after which no row is begun.", lower_bound=1)
OUT = flags.DEFINE_string("out", None, "Where the results go instead.")


def main(argv: list[str]) -> None:
    start = time.monotonic()
    if len(argv) != 2 or argv[1] not in PARTS:
        fail(nearest("part", " ".join(argv[1:]), PARTS))
    part = PARTS[argv[1]]
    try:
        lengths = tuple(int(length) for length in LENGTHS.value or part.LENGTHS)
    except ValueError:
        fail(f"--lengths={','.join(LENGTHS.value)}: expected numbers of tokens, such as 2048,16384")
    if min(lengths) < 2:
        fail(f"--lengths={','.join(map(str, lengths))}: expected numbers above 1")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

    import jax

    device = jax.devices()[0]
    small = QUICK.value or device.platform == "cpu"
    peaks = {
        "matrix product": timing.matrix_flops(1024 if small else 8192),
        "copy": timing.copy_bandwidth(1 << 26 if small else 1 << 30),
    }
    date = time.strftime("%Y-%m-%d")
    print(f"{device.device_kind}, JAX {jax.__version__}, {date}")
    print(
        f"matrix product {peaks['matrix product'] / 1e12:.4g} TFLOP/s, copy {peaks['copy'] / 1e9:.4g} GB/s\n",
        flush=True,
    )
    todo = part.rows(lengths, min(lengths))[:3] if QUICK.value else part.rows(lengths)
    done: list[dict[str, Any]] = []
    while todo and time.monotonic() - start < BUDGET.value:
        done.append(part.measure(todo.pop(0), peaks))
        print(json.dumps(done[-1]), file=sys.stderr, flush=True)
    print(table(done))
    if hasattr(part, "summary"):
        print("\n" + part.summary(done))
    left = [f"{row.name}, {row.length:,} tokens, {row.what}" for row in todo]
    if left:
        print(f"\nnot run, for want of time ({BUDGET.value:.0f} s):" + "".join(f"\n  {row}" for row in left))
    out = Path(OUT.value) if OUT.value else default_path(argv[1], device.device_kind, date)
    out.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "device": device.device_kind,
        "date": date,
        "versions": versions(PACKAGES),
        "peaks": peaks,
        "rows": done,
        "not run": left,
    }
    out.write_text(json.dumps(saved, indent=1) + "\n")
    print(f"\nsaved to {out}")
    sys.exit(0 if any("lcr" in row and not isinstance(row["lcr"], str) for row in done) else 1)


def default_path(part: str, kind: str, date: str) -> Path:
    device = re.sub(r"[^a-z0-9]+", "_", kind.lower()).strip("_")
    return Path(__file__).parents[1] / PARTS[part].MEASURED / f"{device}-{date}.json"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; what a row lacks was not to be had."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        cells = [row.get(column, "–") for column in columns]
        lines.append("| " + " | ".join(f"{c:,}" if isinstance(c, (int, float)) else c for c in cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
