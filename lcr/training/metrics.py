"""What a run reports: `metrics.jsonl`, one JSON object a row, and the same for TensorBoard (without TensorFlow)."""

import json
import logging
import os
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from tensorboardX import SummaryWriter

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


class Row(TypedDict):
    """One row. What is a mean is taken over all steps since the row before.

    step:              updates made so far.
    loss, accuracy:    of the counted tokens: mean cross entropy (nats), share predicted rightly.
    grad_norm:         mean norm of the gradient before clipping.
    learning_rate:     of the last step.
    tokens:            read since the run began, padding left out.
    tokens_per_second: since the row before, compilation left out.
    seconds:           of training since the run began, compilation included, time between sessions left out.

    Of models with mixtures of experts:
    routing_entropy:   mean over tokens and layers of the entropy of a token's distribution over the experts (nats).
    expert_load:       [layer][expert], the share of the tokens' choices that each expert got.
    """

    step: int
    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    tokens: int
    tokens_per_second: float
    seconds: float
    routing_entropy: NotRequired[float]
    expert_load: NotRequired[list[list[float]]]


class MetricsLog:
    """Appends rows; each is in the file, whole, before `write` returns.

    step: rows past it are dropped when the log is opened (they were written after the checkpoint from which the run
        goes on, and will be written again), and so is a last row that was cut short.
    """

    def __init__(self, workdir: Path, step: int):
        self.path = workdir / METRICS
        drop_rows(self.path, step)
        self._stream = self.path.open("a")
        self._tensorboard = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, row: Row) -> None:
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()
        for name, value in row.items():
            if name == "expert_load":
                for layer, load in enumerate(value):  # 1: balance; the number of experts: one has it all
                    self._tensorboard.add_scalar(f"train/max_load/{layer}", max(load) * len(load), row["step"])
            elif name != "step":
                self._tensorboard.add_scalar(f"train/{name}", value, row["step"])

    def close(self) -> None:
        self._stream.close()
        self._tensorboard.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a last one that was cut short is left out, and any other line that is no row
    is passed over with a warning. No file: no rows."""
    if not path.is_file():
        return []
    rows = []
    for number, line in enumerate(path.read_text(errors="replace").split("\n")[:-1], start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        else:
            log.warning("%s, line %d is damaged; it is left out", path, number)
    return rows


def drop_rows(path: Path, step: int) -> None:
    """Rewrites the file without the rows past `step` and without a last line that was cut short."""
    if not path.is_file():
        return
    rows = [row for row in read_rows(path) if row["step"] <= step]
    part = path.with_name(path.name + ".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(part, path)
