"""Trains and evaluates several architectures, one after another, and ends with one report on them all.

    python -m experiments.sweep --sweep=experiments/sweeps/passkey.py --workdir=runs/passkey
    python -m experiments.sweep --sweep=experiments/sweeps/passkey.py:mamba,retnet --workdir=runs/passkey

After the colon come the architectures wanted, all if nothing does. Each is trained in <workdir>/<architecture>; the
rows of all are appended to <workdir>/results.jsonl; the report is <workdir>/report/index.html. The same command given
again goes on where it was: training from its newest checkpoint, evaluation with the cells that are missing.

Exit codes: 0 all is done; 1 some architecture failed (the message says which and why; the others are done all the
same); 2 a mistake in the command; 143 or 130 stopped by SIGTERM or Ctrl-C.
"""

import gc
import sys
import traceback
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.flags import fail, load_sweep, run

SWEEP = flags.DEFINE_string(
    "sweep", None, "The sweep: <file>.py or <file>.py:<architecture>,...; see experiments/sweeps/."
)
WORKDIR = flags.DEFINE_string("workdir", None, "The sweep's folder; made if it is not there.")
flags.mark_flags_as_required(["sweep", "workdir"])

# What ends one architecture, not the sweep: everything that a configuration, a mixer or a device does wrong.
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, OSError, RuntimeError,
    TypeError, ValueError,
)  # fmt: skip


def main() -> None:
    configs = load_sweep(SWEEP.value)
    workdir = Path(WORKDIR.value)

    from lcr.evaluation import describe_report, write_report
    from lcr.evaluation.results import RESULTS, ResultsError, read_rows

    failed = {}
    try:
        read_rows(workdir / RESULTS)  # a line that cannot be read is told before hours of training, not after
        for number, config in enumerate(configs, start=1):
            print(f"\n{config.name} ({number} of {len(configs)})", file=sys.stderr)
            try:
                run_one(config, workdir)
            except FAILURES as error:
                failed[config.name] = tell_failure(config.name, error)
        if len(failed) < len(configs) or (workdir / RESULTS).exists():
            print("\n" + describe_report(write_report(workdir)))
    except ResultsError as error:
        fail(str(error))
    if failed:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        fail(f"{len(failed)} of {len(configs)} architectures failed: {reasons}", 1)


def run_one(config: ConfigDict, workdir: Path) -> None:
    """Trains one architecture, or goes on with it, and evaluates it."""
    from lcr.evaluation import evaluate_run, grid_from_config
    from lcr.evaluation.results import RESULTS
    from lcr.training.run import load_run
    from lcr.training.trainer import train

    folder = workdir / config.name
    train(config, folder)
    gc.collect()  # what training left in memory would count as the evaluation's
    loaded = load_run(folder)
    evaluate_run(loaded, grid_from_config(loaded.config), workdir / RESULTS)


def tell_failure(name: str, error: Exception) -> str:
    """Prints the message, and where it came from unless it says all by itself; returns its first line."""
    from experiments.flags import reported_errors

    if isinstance(error, reported_errors()):
        message = str(error)
    else:
        traceback.print_exception(error)
        message = f"{type(error).__name__}: {error}"
    print(f"error: {name}: {message}\n{name} is left out for now; the sweep goes on.", file=sys.stderr)
    return message.splitlines()[0]


if __name__ == "__main__":
    run(main)
