"""The one trainer: `train(config, workdir)` trains from the start, or goes on from where the workdir is.

A run that was interrupted, by a signal or by SIGKILL, and started again gives the same loss curve, bit for bit, as
one that was not: parameters, optimizer, data position and the sums behind the next logged row are all in the
checkpoint. (On a GPU, XLA must be told to sum in a fixed order: XLA_FLAGS=--xla_gpu_deterministic_ops=true.)

The loop does not wait for the device but where a row is logged or a checkpoint written. A loss or gradient that is
not finite is noticed on the device at once, which then leaves the parameters as they were, and by the loop at the
next such place.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from lcr.data.pipeline import make_batches
from lcr.models.config import model_config
from lcr.data.tokenizers import TOKENIZERS
from lcr.training.checkpoints import (
    CheckpointError,
    CheckpointWriter,
    from_named_arrays,
    named_arrays,
    newest_good,
    read_checkpoint,
)
from lcr.training.config import FREE_ON_RESUME, ConfigError, check_config, differences, from_plain, to_plain
from lcr.training.metrics import MetricsLog, Row
from lcr.training.optimizer import make_optimizer, make_schedule, parameter_groups
from lcr.training.progress import Progress
from lcr.training.run import CHECKPOINTS, CONFIG, make_abstract_model, make_run_model, make_run_task, read_plain
from lcr.training.signals import Stopped, StopSignals
from lcr.training.step import (
    Functional,
    TrainState,
    Window,
    init_state,
    make_step,
    parameter_values,
    select_predictions,
)

SMOOTHING = 0.9  # of the loss by which the best checkpoint is chosen

log = logging.getLogger(__name__)


class NonFiniteError(RuntimeError):
    """Loss or gradient was infinite or not a number; the message has the step and the last good checkpoint."""


def train(config: ConfigDict, workdir: str | Path, *, progress: bool = True) -> Row:
    """Trains as `config` says, in `workdir`; returns the last row of metrics.

    Writes config.json, metrics.jsonl, tensorboard/ and checkpoints/<step>/ there; with `init_from`, source.json too,
    what an export takes over from that checkpoint. Where the workdir holds a run of
    the same configuration it goes on from its newest good checkpoint; a finished run is left as it is. What may
    differ: the sections `training` and `evaluation` (another `training.steps` changes the learning rate from there
    on, and the log says so).

    progress: whether to show it on stderr.
    Raises ConfigError for a configuration that cannot be run or that is not the workdir's; CheckpointError where a
    checkpoint cannot be written; NonFiniteError; `lcr.training.signals.Stopped` after SIGTERM or SIGINT, when the
    step under way is done and saved.
    """
    if jax.process_count() > 1:
        raise ConfigError(f"{jax.process_count()} processes: this trainer runs in one; start it without them")
    check_config(config)
    check_tokenizer(config)
    config = from_plain(to_plain(config))  # ours alone: a caller may go on to change theirs
    workdir = Path(workdir)
    enter_workdir(config, workdir)
    with StopSignals() as signals:
        trainer = Trainer(config, workdir, progress)
        try:
            return trainer.run(signals)
        finally:
            trainer.close()


def check_tokenizer(config: ConfigDict) -> None:
    """Raises ConfigError for a checkpoint's vocabulary that is too small for a tokenizer which is not its own."""
    name, rows = config.task.tokenizer, config.model.get("vocab_size")
    if rows is not None and name in TOKENIZERS and TOKENIZERS[name].vocab_size > rows:
        raise ConfigError(
            f"task.tokenizer={name!r}: it has {TOKENIZERS[name].vocab_size} tokens, the model {rows} (model.vocab_size): "
            "expected the folder with the model's own tokenizer"
        )


def write_first_checkpoint(config: ConfigDict, workdir: str | Path) -> None:
    """Makes a workdir whose checkpoint 0 is what `train` would begin with. Raises as `train` does."""
    check_config(config)
    enter_workdir(config, Path(workdir))
    trainer = Trainer(config, Path(workdir), progress=False)
    try:
        trainer.save()
        trainer.writer.wait()
    finally:
        trainer.close()


def enter_workdir(config: ConfigDict, workdir: Path) -> None:
    """Makes the folder and writes config.json (and source.json), unless it holds another run. Raises ConfigError with
    what differs."""
    path = workdir / CONFIG
    plain = to_plain(config)
    if path.is_file():
        changed = differences(read_plain(path), plain)
        wrong = {key: values for key, values in changed.items() if not key.startswith(FREE_ON_RESUME)}
        if wrong:
            rows = "".join(f"\n  {key}: {old!r} there, {new!r} here" for key, (old, new) in wrong.items())
            raise ConfigError(
                f"workdir={str(workdir)!r} holds a run with another configuration; these keys differ:{rows}\n"
                "Use a new workdir, or give the values of the run there to go on with it."
            )
        if "training.steps" in changed:
            old, new = changed["training.steps"]
            log.warning("training.steps was %s and is %s now: the learning rate follows that from here on", old, new)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"workdir={str(workdir)!r}: the folder cannot be made ({error.strerror}); give one that can be written to"
        ) from error
    part = workdir / (CONFIG + ".part")
    part.write_text(json.dumps(plain, indent=2) + "\n")
    os.replace(part, path)
    if config.init_from is not None:
        from lcr.pretrained.start import keep_source

        try:
            keep_source(config.init_from, workdir)
        except (ValueError, OSError) as error:
            raise ConfigError(f"init_from={config.init_from!r}: {error}") from error


class Trainer:
    """One session of a run: everything that is in memory between two checkpoints."""

    def __init__(self, config: ConfigDict, workdir: Path, progress: bool):
        self.config = config
        self.workdir = workdir
        self.directory = workdir / CHECKPOINTS
        task = make_run_task(config)
        self.batches = make_run_batches(config, task)
        abstract = make_abstract_model(config, task.tokenizer.vocab_size)
        self.functional = Functional(abstract)
        steps = config.training.steps
        self.schedule = make_schedule(config.optimizer, steps)
        self.optimizer = make_optimizer(config.optimizer, steps, parameter_groups(self.functional.variables))
        self.update = make_step(self.functional, self.optimizer, config.optimizer.accumulation)
        self.writer = CheckpointWriter(self.directory, config.training.keep_last)
        self.tokens, self.seconds, self.smoothed, self.row = 0, 0.0, None, None
        self.saved: int | None = None
        self.state, self.step = self.restore(), 0
        if self.state is None:
            self.state = first_state(config, task.tokenizer.vocab_size, self.optimizer, self.functional)
        else:
            self.step = self.saved
        self.metrics = MetricsLog(workdir, self.step)
        self.progress = Progress(steps, self.step, shown=progress)
        self.shapes: set[Any] = set()
        self.since = Stretch()

    def run(self, signals: StopSignals) -> Row:
        """Trains to the last step. Raises as `train` does."""
        training = self.config.training
        if self.step >= training.steps:
            self.progress.say(f"{self.workdir} already has {self.step} steps: nothing to train")
        while self.step < training.steps:
            with data_errors():
                batch = next(self.batches)
            self.advance(batch)
            last = self.step == training.steps
            if self.step % training.log_every == 0 or last:
                self.log_row()
            stop = signals.received  # asked once: it may arrive at any moment, and then waits for the next step
            if self.step % training.checkpoint_every == 0 or last or stop is not None:
                self.save()
            if stop is not None and not last:
                self.writer.wait()
                raise Stopped(stop, self.step, str(self.directory / str(self.step)))
        self.writer.wait()
        return self.row

    def advance(self, batch: dict[str, np.ndarray]) -> None:
        """Starts one update. Waits for the device only where a shape is new and its program must be compiled."""
        selected = select_predictions(batch, self.config.optimizer.accumulation)
        shape = tuple(None if value is None else value.shape for value in selected.values())
        start = time.perf_counter()
        self.state = self.update(self.state, selected)
        if shape not in self.shapes:
            self.shapes.add(shape)
            jax.block_until_ready(self.state)
            spent = time.perf_counter() - start
            self.since.compiling += spent
            self.progress.compiled(*batch["tokens"].shape, spent)
        else:
            self.since.tokens += batch["tokens"].size
        ids = batch.get("segment_ids")
        self.tokens += batch["tokens"].size if ids is None else int(np.count_nonzero(ids))
        self.step += 1

    def log_row(self) -> None:
        """Waits for the device, writes a row about the steps since the last one, and begins the next."""
        self.check_finite()
        self.writer.check()
        window = jax.device_get(self.state.window)
        self.state = self.state.replace(window=Window.empty(window.routing))
        spent, self.since = self.since, Stretch()
        elapsed = self.since.start - spent.start
        self.seconds += elapsed
        loss = float(window.loss) / max(int(window.count), 1)
        self.smoothed = loss if self.smoothed is None else SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss
        self.row = Row(
            step=self.step,
            loss=loss,
            accuracy=int(window.correct) / max(int(window.count), 1),
            grad_norm=float(window.grad_norm) / max(int(window.steps), 1),
            learning_rate=float(self.schedule(jnp.int32(self.step - 1))),
            tokens=self.tokens,
            tokens_per_second=spent.tokens / max(elapsed - spent.compiling, 1e-9),
            seconds=self.seconds,
        )
        if window.routing:
            means = {name: np.asarray(value) / max(int(window.steps), 1) for name, value in window.routing.items()}
            self.row["routing_entropy"] = float(means["entropy"].mean())
            self.row["expert_load"] = means["load"].tolist()
        self.metrics.write(self.row)
        self.progress.update(self.row)

    def check_finite(self) -> None:
        """Raises NonFiniteError if some step so far failed. Waits for the device."""
        failure = jax.device_get(self.state.failure)
        if failure.step == 0:
            return
        good = self.directory / str(self.saved) if self.saved is not None else "none was written yet"
        raise NonFiniteError(
            f"step {failure.step}: loss {failure.loss}, gradient norm {failure.grad_norm} at learning rate "
            f"{float(self.schedule(jnp.int32(failure.step - 1))):.3g}: not finite, so training has stopped. Last good "
            f"checkpoint: {good}. Lower optimizer.learning_rate, lengthen optimizer.warmup_steps or lower "
            "optimizer.clip_norm, and train in a new workdir."
        )

    def save(self) -> None:
        """Begins to write a checkpoint of this step."""
        self.check_finite()
        now = time.perf_counter()
        run = {
            "step": self.step,
            "data": self.batches.get_state(),
            "tokens": self.tokens,
            "seconds": self.seconds + now - self.since.start,
            "smoothed_loss": self.smoothed,
            "row": self.row,
            "config": to_plain(self.config),
        }
        self.writer.save(self.step, to_arrays(self.state), run, self.smoothed)
        self.saved = self.step

    def restore(self) -> TrainState | None:
        """The state of the newest good checkpoint, with the data's position and the counters put back."""
        step, damaged = newest_good(self.directory)
        self.writer.clear_away(damaged)
        if step is None:
            if damaged:
                log.warning("no checkpoint in %s is whole: training begins anew", self.directory)
            return None
        parameters = {name: variable.get_value() for name, variable in self.functional.variables.items()}
        like = jax.eval_shape(lambda p: init_state(p, self.optimizer, self.functional), parameters)
        path = self.directory / str(step)
        arrays, run = read_checkpoint(path, to_arrays(like))
        with data_errors():
            self.batches.set_state(run["data"])
        self.tokens, self.seconds, self.smoothed, self.row = (
            run[key] for key in ("tokens", "seconds", "smoothed_loss", "row")
        )
        self.saved = step
        log.info("going on from checkpoint %s", path)
        return from_arrays(like, arrays)

    def close(self) -> None:
        with contextlib.ExitStack() as stack:  # each is closed, whatever happens to the others
            for part in (self.writer, self.metrics, self.progress):
                stack.callback(part.close)


class Stretch:
    """What happened since the last row: when it began, seconds spent compiling, tokens of the other steps."""

    def __init__(self):
        self.start = time.perf_counter()
        self.compiling = 0.0
        self.tokens = 0


def to_arrays(state: TrainState) -> dict[str, dict[str, Any]]:
    """The state as a checkpoint holds it: the parameters on their own, for those who only want the model."""
    return {"params": state.parameters, "training": named_arrays(state.replace(parameters={}))}


def from_arrays(like: TrainState, arrays: dict[str, dict[str, Any]]) -> TrainState:
    rest = from_named_arrays(like.replace(parameters={}), arrays["training"])
    return rest.replace(parameters=arrays["params"])


def make_run_batches(config: ConfigDict, task: Any) -> Iterator[dict[str, np.ndarray]]:
    """The batches that the configuration names."""
    with data_errors():
        return make_batches(
            task,
            batch_tokens=config.data.batch_tokens,
            lengths=config.data.lengths,
            curriculum=config.data.curriculum,
            seed=config.seed,
        )


@contextlib.contextmanager
def data_errors() -> Iterator[None]:
    """What is wrong with the data is the user's to mend: a corpus that is empty, unreadable or not the run's own."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise ConfigError(f"data: {error}") from error


def first_state(
    config: ConfigDict, vocab_size: int, optimizer: optax.GradientTransformation, functional: Functional
) -> TrainState:
    """The state before the first step, a function of the seed.

    One program, as op by op takes longer, and hardly optimised: random numbers, drawn once, are compiled five times
    faster that way (on two CPU cores 1.5 s instead of 8 s for a model of two Mamba layers).

    Raises: ConfigError where `init_from` cannot be read, or fits nowhere.
    """

    def draw():
        return parameter_values(make_run_model(config, vocab_size))

    def once(make):
        return jax.jit(make).lower().compile(compiler_options={"xla_backend_optimization_level": 0})()

    if config.init_from is None:
        return once(lambda: init_state(draw(), optimizer, functional))
    from lcr.pretrained.start import initial_parameters

    model = {"vocab_size": vocab_size, **config.model.to_dict()}
    try:
        parameters, drawn = initial_parameters(config.init_from, model_config(model), once(draw))
    except (ValueError, OSError, CheckpointError) as error:
        raise ConfigError(f"init_from={config.init_from!r}: {error}") from error
    if drawn:
        shown = ", ".join(drawn[:10]) + (f" and {len(drawn) - 10} more" if len(drawn) > 10 else "")
        log.warning("%s has no parameters for %s: they are drawn at random", config.init_from, shown)
    return jax.jit(lambda parameters: init_state(parameters, optimizer, functional))(parameters)
