"""Evaluates a model that is no run of this project: a checkpoint of others, with its own tokenizer."""

import hashlib
import os
from pathlib import Path

import jax
import numpy as np
from flax import nnx

from lcr.data.tokenizers import TOKENIZERS
from lcr.evaluation.cells import evaluate_grid
from lcr.evaluation.grid import Grid, GridError, Subject
from lcr.evaluation.progress import EvaluationProgress
from lcr.evaluation.results import Row
from lcr.evaluation.streaming import Streamer
from lcr.pretrained.load import is_run
from lcr.pretrained.load import read_config as read_fields
from lcr.tasks.passkey import PasskeyTask
from lcr.training.run import read_config

LENGTH_FIELDS = ("max_position_embeddings", "context_length")
SAMPLED = 4096  # elements of each parameter that a fingerprint reads


def evaluate_checkpoint(
    model: nnx.Module,
    task: PasskeyTask,
    grid: Grid,
    path: str | os.PathLike,
    *,
    name: str,
    training_length: int,
    shown: bool = True,
) -> list[Row]:
    """Evaluates a loaded model on `grid`: see `evaluate_grid`, whose errors it raises.

    name: what the rows and pictures call it. training_length: of the longest text that it was trained on, in tokens.
    shown: whether progress is shown on stderr.
    """
    if task.tokenizer.name in TOKENIZERS and task.tokenizer.vocab_size > model.config.vocab_size:
        raise GridError(
            f"the model has {model.config.vocab_size} tokens, the tokenizer {task.tokenizer.name!r} "
            f"{task.tokenizer.vocab_size}: expected the files of the model's own tokenizer beside it"
        )
    subject = Subject(
        architecture=name,
        haystack=task.haystack,
        question=task.question,
        checkpoint_step=0,
        training_length=training_length,
        configuration=fingerprint(model, task.tokenizer.name),
    )
    progress = EvaluationProgress(name, shown=shown)
    try:
        return evaluate_grid(Streamer(model, grid.piece), task, subject, grid, path, progress)
    finally:
        progress.close()


def stated_length(path: str | os.PathLike) -> int | None:
    """The length in tokens on which a checkpoint, or a run, says that it was trained; None where it does not say."""
    if is_run(path):
        config = read_config(Path(path))
        return max(config.data.lengths)
    if not Path(path).is_dir():
        return None
    fields, _ = read_fields(Path(path))
    lengths = [fields.get(name) for name in LENGTH_FIELDS]
    return next((length for length in lengths if isinstance(length, int) and length > 0), None)


def fingerprint(model: nnx.Module, tokenizer: str) -> str:
    """Twelve hex digits that differ where models do: of the configuration, the tokenizer's name, and of every parameter
    its name and up to `SAMPLED` elements, evenly spaced (a change that spares all of these is not seen)."""
    digest = hashlib.sha256(f"{model.config} {tokenizer}".encode())
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        value = variable.get_value().reshape(-1)
        sample = value[:: max(1, value.size // SAMPLED)]
        digest.update(f"{path} {value.dtype} {variable.get_value().shape}".encode())
        digest.update(np.asarray(jax.device_get(sample)).tobytes())
    return digest.hexdigest()[:12]


def checkpoint_name(path: str | os.PathLike) -> str:
    """What the rows call the checkpoint of this folder or file."""
    return Path(path).resolve().stem if Path(path).is_file() else Path(path).resolve().name
