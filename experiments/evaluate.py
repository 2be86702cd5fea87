"""Evaluates a model on a grid, context length x needle depth, however long, in memory that does not grow.

    python -m experiments.evaluate --workdir=runs/mamba
    python -m experiments.evaluate --workdir=runs/mamba --lengths=1K,64K,1M --depths=0,0.25,0.5,0.75,1 --samples=20
    python -m experiments.evaluate --model=path/to/folder --workdir=runs/folder --lengths=1K,4K

Without --model it is the run in the workdir. With it, a Hugging Face folder, an RWKV-7 .pth file or another run, asked
for passkeys in its own tokenizer; the workdir takes the results. What is not given comes from the section `evaluation`
of the run's configuration (with --model: from the defaults of one). A row for each cell is appended to
<workdir>/results.jsonl as soon as it is known; cells that are there already (same samples, seed and checkpoint) are
not computed again, so a command that was stopped goes on where it was. `python -m experiments.report` draws them.

Exit codes: 0 every cell is there; 2 a mistake in the command, or no run to evaluate; 130 stopped by Ctrl-C.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments.flags import fail, run

if TYPE_CHECKING:
    from lcr.evaluation import Grid, Row

WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder, as experiments.train made it; or that of the results.")
MODEL = flags.DEFINE_string("model", None, "A checkpoint's folder, a .pth file, or a run's folder, instead of the run.")
LENGTHS = flags.DEFINE_list("lengths", None, "Lengths in tokens, answer included: 640,1024 or 1K,64K,1M (1K = 1024).")
DEPTHS = flags.DEFINE_list("depths", None, "Where the needle is put: numbers from 0 (start) to 1 (end).")
SAMPLES = flags.DEFINE_integer(
    "samples", None, "Prompts for each cell, at every length (evaluation.max_tokens then sets no limit)."
)
BATCH = flags.DEFINE_integer("batch", None, "Prompts read side by side, at most.")
PIECE = flags.DEFINE_integer("piece", None, "Tokens of each prompt read per call.")
SEED = flags.DEFINE_integer("seed", None, "Of the prompts; the run's own if not given.")
STEP = flags.DEFINE_integer("step", None, "Checkpoint of the run to evaluate; the newest if not given.")
HAYSTACK = flags.DEFINE_enum("haystack", None, ["repeat", "words", "text"], "With --model: what keys are hidden in.")
QUESTION = flags.DEFINE_enum("question", None, ["last", "first"], "With --model: where the question stands.")
TRAINING_LENGTH = flags.DEFINE_integer(
    "training_length", None, "With --model: tokens of the longest text it was trained on, where it does not say.",
    lower_bound=1,
)  # fmt: skip
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "With --model: of the compute.")
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    lengths = tuple(map(parse_length, LENGTHS.value)) if LENGTHS.value is not None else None
    depths = tuple(map(parse_depth, DEPTHS.value)) if DEPTHS.value is not None else None

    if MODEL.value is None:
        for flag in (HAYSTACK, QUESTION, TRAINING_LENGTH, DTYPE):
            if flag.value is not None:
                fail(f"--{flag.name}: a run has its own; it goes with --model")
    elif STEP.value is not None:
        fail("--step: a model given by --model has no steps; it goes without")

    from lcr.evaluation import print_table, select_series
    from lcr.evaluation.grid import GridError
    from lcr.evaluation.results import ResultsError
    from lcr.training.checkpoints import CheckpointError
    from lcr.training.config import ConfigError

    try:
        rows, path = (evaluate_workdir if MODEL.value is None else evaluate_model)(lengths, depths)
    except (CheckpointError, ConfigError, GridError, ResultsError) as error:
        fail(str(error))
    print(print_table(select_series(rows)[0]))
    print(f"\n{len(rows)} cells in {path}; for pictures: python -m experiments.report --workdir={WORKDIR.value}")


def evaluate_workdir(lengths: tuple[int, ...] | None, depths: tuple[float, ...] | None) -> tuple[list["Row"], Path]:
    """The rows of the run in the workdir, and their file."""
    from lcr.evaluation import evaluate_run
    from lcr.evaluation.results import RESULTS
    from lcr.training.run import load_run

    loaded = load_run(WORKDIR.value, STEP.value)
    path = loaded.workdir / RESULTS
    return evaluate_run(loaded, override(loaded.config, lengths, depths), path), path


def evaluate_model(lengths: tuple[int, ...] | None, depths: tuple[float, ...] | None) -> tuple[list["Row"], Path]:
    """The rows of the model that --model names, and their file in the workdir."""
    import lcr
    from lcr.evaluation.checkpoints import checkpoint_name, evaluate_checkpoint, stated_length
    from lcr.evaluation.results import RESULTS
    from lcr.tasks.passkey import PasskeyTask
    from lcr.training.config import default_config

    try:
        model, tokenizer = lcr.load_pretrained(MODEL.value, dtype=DTYPE.value)
        task = PasskeyTask(tokenizer, haystack=HAYSTACK.value or "repeat", question=QUESTION.value or "last")
    except (ValueError, OSError) as error:
        fail(str(error))
    trained = TRAINING_LENGTH.value or stated_length(MODEL.value)
    if trained is None:
        fail(f"{MODEL.value} does not say how long the texts were that it was trained on: give --training_length=TOKENS")
    workdir = Path(WORKDIR.value)
    workdir.mkdir(parents=True, exist_ok=True)
    path, grid = workdir / RESULTS, override(default_config(), lengths, depths)
    name = checkpoint_name(MODEL.value)
    return evaluate_checkpoint(model, task, grid, path, name=name, training_length=trained), path


def override(config, lengths: tuple[int, ...] | None, depths: tuple[float, ...] | None) -> "Grid":
    """The grid of the configuration with what the command line says instead."""
    from lcr.evaluation import grid_from_config

    changes = {"lengths": lengths, "depths": depths, "samples": SAMPLES.value}
    changes |= {"batch": BATCH.value, "piece": PIECE.value, "seed": SEED.value}
    changes = {name: value for name, value in changes.items() if value is not None}
    if SAMPLES.value is not None:
        changes["max_tokens"] = 0
    return dataclasses.replace(grid_from_config(config), **changes)


def parse_length(text: str) -> int:
    """ "640", "64K" or "1M" as a number of tokens. Ends the program where it is none."""
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M") else (text, "")
    if not digits.isascii() or not digits.isdigit() or int(digits) == 0:
        fail(f"--lengths: {text!r} is no length: expected a number of tokens above 0, such as 640, 64K or 1M")
    return int(digits) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit]


def parse_depth(text: str) -> float:
    """A number from 0 to 1. Ends the program where it is none."""
    try:
        depth = float(text)
    except ValueError:
        depth = -1.0
    if not 0 <= depth <= 1:
        fail(f"--depths: {text!r} is no depth: expected a number from 0 (needle at the start) to 1 (at the end)")
    return depth


if __name__ == "__main__":
    run(main)
