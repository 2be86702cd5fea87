"""Finds a learning rate for each architecture of a sweep: the one with the lowest loss after a short run.

    python -m experiments.learning_rates --sweep=experiments/sweeps/passkey.py --workdir=runs/learning_rates

Each architecture is trained for --steps steps (warm-up and cosine included) with each of --values, everything else as
its configuration says. The losses (nats, mean of the last fifth of the run) are appended to
<workdir>/learning_rates.jsonl, and the table is printed; the same command given again does only what is missing. What
is chosen is for a person to write into the configurations.

Exit codes: 0 all is done; 1 a run could not go on; 2 a mistake in the command; 143 or 130 stopped by a signal.
"""

import json
import math
import sys
import tempfile
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.flags import fail, load_sweep, read_json_lines, run

SWEEP = flags.DEFINE_string("sweep", None, "The sweep: <file>.py or <file>.py:<architecture>,...")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the short runs and their losses; made if not there.")
VALUES = flags.DEFINE_list("values", ["1.5e-3", "3e-3", "6e-3", "1.2e-2"], "The learning rates tried.")
STEPS = flags.DEFINE_integer("steps", 200, "Steps of each run.", lower_bound=10)
flags.mark_flags_as_required(["sweep", "workdir"])

LOSSES = "learning_rates.jsonl"
KEY = ("name", "learning_rate", "configuration", "steps")  # of a row; configuration: the digest of all that was set


def main() -> None:
    from lcr.evaluation.grid import configuration_digest

    values = [read_value(text) for text in VALUES.value]
    if not values:
        fail("--values: expected numbers above 0, parted by commas")
    path = Path(WORKDIR.value) / LOSSES
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = {(config.name, value): short(config, value) for config in load_sweep(SWEEP.value) for value in values}
    keys = {run: (*run, configuration_digest(config), STEPS.value) for run, config in runs.items()}
    for (name, value), config in runs.items():
        if keys[name, value] not in losses_in(path):
            print(f"\n{name}, learning rate {value:g}", file=sys.stderr)
            row = dict(zip(KEY, keys[name, value], strict=True)) | {"loss": loss_of(config, path.parent)}
            with path.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    losses = losses_in(path)
    print(table(values, {run: losses[key] for run, key in keys.items()}))


def read_value(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        fail(f"--values: {text!r}: expected numbers above 0, parted by commas")
    return value


def losses_in(path: Path) -> dict[tuple, float | None]:
    return {tuple(row[name] for name in KEY): row["loss"] for row in read_json_lines(path)}


def short(config: ConfigDict, learning_rate: float) -> ConfigDict:
    config = config.copy_and_resolve_references()
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, STEPS.value // 4)
    config.training.steps = config.training.checkpoint_every = STEPS.value
    return config


def loss_of(config: ConfigDict, folder: Path) -> float | None:
    """The loss that a run comes to; None where it is not finite on the way. Its files are in `folder` until it ends."""
    from lcr.training.metrics import METRICS, read_rows
    from lcr.training.trainer import NonFiniteError, train

    with tempfile.TemporaryDirectory(prefix="short_run_", dir=folder) as workdir:
        try:
            train(config, workdir)
        except NonFiniteError:
            return None
        last = [row["loss"] for row in read_rows(Path(workdir) / METRICS) if row["step"] > 0.8 * STEPS.value]
    return sum(last) / len(last)


def table(values: list[float], losses: dict[tuple[str, float], float | None]) -> str:
    """A line for each architecture: the loss at each value, and the best value."""
    lines = ["".ljust(16) + "".join(f"{value:>10g}" for value in values) + "      best"]
    for name in dict.fromkeys(name for name, _ in losses):
        found = [losses[name, value] for value in values]
        finite = [(loss, value) for loss, value in zip(found, values, strict=True) if loss is not None]
        cells = ["–" if loss is None else f"{loss:.4f}" for loss in found] + [f"{min(finite)[1]:g}" if finite else "–"]
        lines.append(name.ljust(16) + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
