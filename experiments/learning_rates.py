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
import shutil
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.flags import fail, load_sweep, run

SWEEP = flags.DEFINE_string("sweep", None, "The sweep: <file>.py or <file>.py:<architecture>,...")
WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the short runs and their losses; made if not there.")
VALUES = flags.DEFINE_list("values", ["1.5e-3", "3e-3", "6e-3", "1.2e-2"], "The learning rates tried.")
STEPS = flags.DEFINE_integer("steps", 200, "Steps of each run.", lower_bound=10)
flags.mark_flags_as_required(["sweep", "workdir"])

LOSSES = "learning_rates.jsonl"


def main() -> None:
    from lcr.training.metrics import read_rows

    values = [read_value(text) for text in VALUES.value]
    configs = load_sweep(SWEEP.value)
    path = Path(WORKDIR.value) / LOSSES
    path.parent.mkdir(parents=True, exist_ok=True)
    for config in configs:
        for value in values:
            if all(key_of(row) != (config.name, STEPS.value, value) for row in losses_in(path)):
                with path.open("a") as stream:
                    loss = short_run(config, value, path.parent / config.name, read_rows)
                    row = {"name": config.name, "steps": STEPS.value, "learning_rate": value, "loss": loss}
                    stream.write(json.dumps(row) + "\n")
    print(table([config.name for config in configs], values, losses_in(path)))


def read_value(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        fail(f"--values: {text!r}: expected numbers above 0, parted by commas")
    return value


def losses_in(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def key_of(row: dict) -> tuple:
    return row["name"], row["steps"], row["learning_rate"]


def short_run(config: ConfigDict, learning_rate: float, folder: Path, read_rows) -> float:
    """The loss that `config` comes to with this learning rate; infinite where it is not finite on the way."""
    from lcr.training.metrics import METRICS
    from lcr.training.trainer import NonFiniteError, train

    config = config.copy_and_resolve_references()
    config.optimizer.learning_rate = learning_rate
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, STEPS.value // 4)
    config.training.steps = config.training.checkpoint_every = STEPS.value
    print(f"\n{config.name}, learning rate {learning_rate:g}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was stopped
    try:
        train(config, folder)
    except NonFiniteError:
        return math.inf
    finally:
        rows = read_rows(folder / METRICS)
        shutil.rmtree(folder, ignore_errors=True)
    last = [row["loss"] for row in rows if row["step"] > 0.8 * STEPS.value]
    return sum(last) / len(last)


def table(names: list[str], values: list[float], rows: list[dict]) -> str:
    """A line for each architecture: the loss at each value, and the best value."""
    losses = {key_of(row): row["loss"] for row in rows}
    lines = ["".ljust(16) + "".join(f"{value:>10g}" for value in values) + "      best"]
    for name in names:
        of_name = [losses[name, STEPS.value, value] for value in values]
        best = values[of_name.index(min(of_name))]
        lines.append(name.ljust(16) + "".join(f"{loss:>10.4f}" for loss in of_name) + f"{best:>10g}")
    return "\n".join(lines)


if __name__ == "__main__":
    run(main)
