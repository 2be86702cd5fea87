import errno
import json
import logging
import os
import signal

import jax
import numpy as np
import pytest
from lcr.training import checkpoints, trainer
from lcr.training.checkpoints import CheckpointError, list_steps
from lcr.training.config import ConfigError
from lcr.training.metrics import MetricsLog, read_rows
from lcr.training.run import load_run
from lcr.training.signals import Stopped
from lcr.training.step import parameter_values
from lcr.training.trainer import NonFiniteError, train

from pallas_kernels.tolerances import assert_close
from tests.training.toy import compiled_programs_kept_in, toy_config, toy_models

TIMINGS = ("tokens_per_second", "seconds")


@pytest.fixture(scope="module", autouse=True)
def toys(tmp_path_factory):
    with toy_models(), compiled_programs_kept_in(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    workdir = tmp_path_factory.mktemp("whole")
    train(toy_config(), workdir, progress=False)
    return workdir


def curve(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def interrupt(monkeypatch, step, action):
    """Calls `action` once, when the row of this step has been written."""
    write = MetricsLog.write

    def writing(self, row):
        write(self, row)
        if row["step"] == step:
            monkeypatch.setattr(MetricsLog, "write", write)
            action()

    monkeypatch.setattr(MetricsLog, "write", writing)


def test_a_run_leaves_its_configuration_metrics_and_checkpoints(whole):
    config = toy_config()
    assert json.loads((whole / "config.json").read_text())["optimizer"]["learning_rate"] == 3e-3
    rows = read_rows(whole / "metrics.jsonl")
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert set(rows[0]) == {"step", "loss", "accuracy", "grad_norm", "learning_rate", "tokens", *TIMINGS}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[0]["learning_rate"] == np.float32(config.optimizer.learning_rate)
    assert 12 * 384 <= rows[-1]["tokens"] <= 12 * 400
    assert list((whole / "tensorboard").glob("events.out.tfevents.*"))
    assert set(list_steps(whole / "checkpoints")) >= {10, 12}
    manifest = json.loads((whole / "checkpoints" / "12" / "manifest.json").read_text())
    assert manifest["loss"] is not None


def test_the_last_row_is_returned_and_a_finished_run_left_alone(whole):
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("checkpoints/**/*")}
    assert train(toy_config(), whole, progress=False) == read_rows(whole / "metrics.jsonl")[-1]
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("checkpoints/**/*")} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_and_the_run_goes_on_bit_for_bit(whole, tmp_path, monkeypatch, number):
    handler = signal.getsignal(number)
    interrupt(monkeypatch, 4, lambda: os.kill(os.getpid(), number))
    with pytest.raises(Stopped) as caught:
        train(toy_config(**{"training.log_every": 4}), tmp_path, progress=False)
    assert caught.value.signal == number and signal.getsignal(number) == handler
    stopped_at = caught.value.step
    saved = tmp_path / "checkpoints" / str(stopped_at)
    assert f"after step {stopped_at}, which is saved in {saved}; the same command goes on" in str(caught.value)
    assert list_steps(tmp_path / "checkpoints")[-1] == stopped_at < 12

    train(toy_config(**{"training.log_every": 4}), tmp_path, progress=False)
    assert [row["step"] for row in curve(tmp_path)] == [4, 8, 12]
    assert_close(parameter_values(load_run(tmp_path).model), parameter_values(load_run(whole).model), "exact")


def test_a_second_signal_is_obeyed_at_once(monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append((pid, number, signal.getsignal(number))))
    with trainer.StopSignals() as signals:
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM and not killed
        signal.raise_signal(signal.SIGTERM)
    assert killed == [(os.getpid(), signal.SIGTERM, signal.SIG_DFL)]


def test_rows_after_the_checkpoint_are_written_again_not_twice(whole, tmp_path, monkeypatch, caplog):
    def die():
        raise KeyboardInterrupt

    interrupt(monkeypatch, 8, die)  # the last checkpoint is that of step 5, between two rows
    with pytest.raises(KeyboardInterrupt):
        train(toy_config(), tmp_path, progress=False)
    assert [row["step"] for row in curve(tmp_path)] == [2, 4, 6, 8]
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "lo')  # a row cut short
    caplog.set_level(logging.INFO)
    train(toy_config(), tmp_path, progress=False)
    assert f"going on from checkpoint {tmp_path / 'checkpoints' / '5'}" in caplog.text
    assert curve(tmp_path) == curve(whole)


def test_a_damaged_newest_checkpoint_costs_only_the_steps_since_the_one_before(whole, tmp_path, monkeypatch, caplog):
    interrupt(monkeypatch, 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(toy_config(), tmp_path, progress=False)
    file = max((tmp_path / "checkpoints" / "10").rglob("ocdbt.process_0/d/*"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)
    caplog.set_level(logging.INFO)
    train(toy_config(), tmp_path, progress=False)
    assert "10 cannot be used" in caplog.text and "kept as 10.corrupt" in caplog.text
    assert f"going on from checkpoint {tmp_path / 'checkpoints' / '5'}" in caplog.text
    assert curve(tmp_path) == curve(whole)


def test_a_workdir_with_another_configuration_is_refused_naming_what_differs(whole):
    config = toy_config(**{"seed": 1, "optimizer.learning_rate": 1e-2, "training.log_every": 3})
    with pytest.raises(ConfigError) as caught:
        train(config, whole, progress=False)
    message = str(caught.value)
    assert "holds a run with another configuration" in message
    assert "seed: 0 there, 1 here" in message and "optimizer.learning_rate: 0.003 there, 0.01 here" in message
    assert "log_every" not in message
    assert json.loads((whole / "config.json").read_text())["seed"] == 0


def test_a_damaged_line_of_metrics_is_left_out_with_a_warning(tmp_path, caplog):
    train(toy_config(**{"training.steps": 4}), tmp_path, progress=False)
    path = tmp_path / "metrics.jsonl"
    first, second, _ = path.read_text().split("\n")
    path.write_text(f"{first[:20]}\n{second}\n")
    train(toy_config(**{"training.steps": 6}), tmp_path, progress=False)
    assert "metrics.jsonl, line 1 is damaged; it is left out" in caplog.text
    assert [row["step"] for row in read_rows(path)] == [4, 6]


def test_a_workdir_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="workdir='.*file': the folder cannot be made .* give one that can be written"):
        train(toy_config(), tmp_path / "file", progress=False)


def test_a_run_may_be_made_longer_and_says_what_that_means(tmp_path, caplog):
    train(toy_config(**{"training.steps": 4}), tmp_path, progress=False)
    row = train(toy_config(**{"training.steps": 6, "evaluation.samples": 3}), tmp_path, progress=False)
    assert row["step"] == 6
    assert "training.steps was 4 and is 6 now: the learning rate follows that" in caplog.text
    assert load_run(tmp_path).config.evaluation.samples == 3


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_good_parameters(tmp_path, monkeypatch):
    advance = trainer.Trainer.advance

    def poisoning(self, batch):
        if self.step == 6:  # step 7 will fail, and be seen in the row of step 8
            broken = self.state.parameters | {"log_decay": jax.numpy.full(8, jax.numpy.nan)}
            self.state = self.state.replace(parameters=broken)
        advance(self, batch)

    monkeypatch.setattr(trainer.Trainer, "advance", poisoning)
    with pytest.raises(NonFiniteError) as caught:
        train(toy_config(), tmp_path, progress=False)
    message = str(caught.value)
    assert message.startswith("step 7: loss nan, gradient norm nan at learning rate 0.00207")
    assert f"Last good checkpoint: {tmp_path / 'checkpoints' / '5'}" in message
    assert "Lower optimizer.learning_rate" in message
    assert [row["step"] for row in curve(tmp_path)] == [2, 4, 6]
    assert all(np.isfinite(value).all() for value in parameter_values(load_run(tmp_path).model).values())


def test_no_checkpoint_is_written_of_a_run_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "select_predictions", lambda batch, _: exploding(batch))
    config = toy_config(**{"training.log_every": 100, "training.checkpoint_every": 3})
    with pytest.raises(NonFiniteError, match="step 1: .* Last good checkpoint: none was written yet"):
        train(config, tmp_path, progress=False)
    assert list_steps(tmp_path / "checkpoints") == []


def exploding(batch):
    tokens = batch["tokens"]
    weights = np.ones((len(tokens), 1), np.bool_)
    positions, targets = np.zeros((len(tokens), 1), np.int32), np.full((len(tokens), 1), 10**6, np.int32)
    return {"tokens": tokens, "segment_ids": None, "positions": positions, "targets": targets, "weights": weights}


def test_a_full_disk_stops_the_run_and_it_goes_on_when_there_is_room(whole, tmp_path, monkeypatch):
    sums = checkpoints.file_sums

    def full(path):
        if path.name == "10":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return sums(path)

    monkeypatch.setattr(checkpoints, "file_sums", full)
    with pytest.raises(CheckpointError, match="step 10 could not be written .* the disk is full. .* Free disk space"):
        train(toy_config(), tmp_path, progress=False)
    assert list_steps(tmp_path / "checkpoints") == [5]
    monkeypatch.undo()
    train(toy_config(), tmp_path, progress=False)
    assert curve(tmp_path) == curve(whole)


def test_packed_documents_are_trained_on_and_their_position_kept(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("one two three four " * 60)
    monkeypatch.setenv("LCR_DATA_DIR", str(tmp_path / "data"))
    values = {"data.lengths": (32,), "training.steps": 6, "training.checkpoint_every": 3}
    config = toy_config(**values)
    with config.unlocked():
        config.task = {"name": "text", "tokenizer": "bytes", "source": f"files:{tmp_path}/corpus.txt"}
    train(config, tmp_path / "whole", progress=False)
    interrupt(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        train(config, tmp_path / "stopped", progress=False)
    train(config, tmp_path / "stopped", progress=False)
    assert curve(tmp_path / "stopped") == curve(tmp_path / "whole")

    (tmp_path / "corpus.txt").write_text("quite another text " * 60)
    with pytest.raises(ConfigError, match="data: the run began with the corpus"):
        train(config, tmp_path / "stopped", progress=False)


@pytest.mark.parametrize(
    "source, message", [("files:/nowhere/*.txt", "task: .*nowhere"), ("file:x", "task: source='file:x': expected")]
)
def test_a_corpus_that_cannot_be_read_is_the_users_to_mend(tmp_path, source, message):
    config = toy_config()
    with config.unlocked():
        config.task = {"name": "text", "tokenizer": "bytes", "source": source}
    with pytest.raises(ConfigError, match=message):
        train(config, tmp_path, progress=False)


def test_progress_goes_to_stderr_in_plain_lines_where_there_is_no_terminal(tmp_path, capfd):
    train(toy_config(**{"training.steps": 4, "data.lengths": (96,)}), tmp_path)
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("compiled the step for 4 rows of 96 tokens: ")
    assert lines[1].startswith("step 2/4: loss ") and "tokens/s" in lines[1] and "steps/s" in lines[1]
    assert lines[2].endswith("00:00 left")
