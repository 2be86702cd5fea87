"""Killed at any moment and started again, a run gives the loss curve of one that was left alone, bit for bit."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
from lcr.training.metrics import read_rows
from lcr.training.run import load_run
from lcr.training.step import parameter_values
from lcr.training.trainer import train

from experiments.configs.passkey import get_config
from pallas_kernels.tolerances import assert_close
from tests.compiling import UNOPTIMIZED
from tests.training.toy import CACHE_SETTINGS, compiled_programs_kept_in

STEPS = 60
VALUES = {
    "model.d_model": 16,
    "model.mixers": ("mha",),
    "model.d_ff": 0,
    "data.lengths": (96,),
    "data.batch_tokens": 192,
    "evaluation.lengths": (96,),
    "optimizer.warmup_steps": 10,
    "training.steps": STEPS,
    "training.log_every": 1,
    "training.checkpoint_every": 11,
}
ROOT = Path(__file__).parents[2]


class Session:
    """One `python -m experiments.train` in a process of its own."""

    def __init__(self, workdir, compiled):
        arguments = ["--config=experiments/configs/passkey.py:mha", f"--workdir={workdir}"]
        arguments += [f"--config.{key}={value}" for key, value in VALUES.items()]
        settings = {name.upper(): str(value) for name, value in CACHE_SETTINGS.items()}
        settings |= UNOPTIMIZED | {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_PLATFORMS": "cpu"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.train", *arguments],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines = []

    def read_until(self, step):
        """Returns when the program says that it has come that far."""
        for line in self.process.stderr:
            self.lines.append(line)
            found = re.match(r"step (\d+)/", line)
            if found and int(found[1]) >= step:
                return
        raise AssertionError(f"ended before step {step}:\n" + "".join(self.lines))

    def end(self):
        """Kills it; returns the exit code and all that was said."""
        self.process.kill()
        self.lines += self.process.stderr
        self.process.stderr.close()
        return self.process.wait(), "".join(self.lines)


def curve(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in ("tokens_per_second", "seconds")} for row in rows]


def train_here(workdir, compiled):
    """The same in this process."""
    config = get_config("mha")
    config.update_from_flattened_dict(VALUES)
    with compiled_programs_kept_in(compiled):
        train(config, workdir, progress=False)


def test_kills_leave_the_curve_bit_for_bit(tmp_path, caplog):
    """Before there is a checkpoint, just after one (or while it is written), and half way to the next. What is not to
    be killed runs in this process, where all is imported already."""
    killed, whole, compiled = tmp_path / "killed", tmp_path / "whole", tmp_path / "compiled"
    for moment in (5, 23, 38):
        session = Session(killed, compiled)
        session.read_until(moment)
        code, said = session.end()
        assert code == -signal.SIGKILL, said
        assert moment <= read_rows(killed / "metrics.jsonl")[-1]["step"] < STEPS

    with caplog.at_level("INFO", "lcr.training"):
        train_here(whole, compiled)
        assert "going on from checkpoint" not in caplog.text
        train_here(killed, compiled)
        assert "going on from checkpoint" in caplog.text
    assert curve(killed) == curve(whole)
    assert [row["step"] for row in curve(killed)] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) for row in curve(killed))
    assert_close(parameter_values(load_run(killed).model), parameter_values(load_run(whole).model), "exact")
