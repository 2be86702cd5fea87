"""Killed at any moment and started again, a run gives the loss curve of one that was left alone, bit for bit."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from lcr.training.metrics import read_rows
from lcr.training.run import load_run
from lcr.training.step import parameter_values

from tests.compiling import UNOPTIMIZED
from pallas_kernels.tolerances import assert_close
from tests.training.toy import CACHE_SETTINGS

STEPS = 120
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

    def end(self, kill=False):
        """Kills it or lets it end; returns the exit code and all that was said."""
        if kill:
            self.process.kill()
        self.lines += self.process.stderr
        self.process.stderr.close()
        return self.process.wait(), "".join(self.lines)


def curve(workdir):
    rows = read_rows(workdir / "metrics.jsonl")
    return [{key: row[key] for key in row if key not in ("tokens_per_second", "seconds")} for row in rows]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled):
    workdir = tmp_path_factory.mktemp("whole")
    code, said = Session(workdir, compiled).end()
    assert code == 0, said
    return workdir


def test_five_kills_leave_the_curve_bit_for_bit(whole, compiled, tmp_path):
    moments = sorted(random.Random(20).sample(range(5, STEPS - 30), 5))
    for moment in moments:
        session = Session(tmp_path, compiled)
        session.read_until(moment)
        code, said = session.end(kill=True)
        assert code == -signal.SIGKILL, said
        assert moment <= read_rows(tmp_path / "metrics.jsonl")[-1]["step"] < STEPS

    code, said = Session(tmp_path, compiled).end()
    assert code == 0 and "going on from checkpoint" in said, said
    assert curve(tmp_path) == curve(whole)
    assert [row["step"] for row in curve(tmp_path)] == list(range(1, STEPS + 1))
    assert all(np.isfinite(row["loss"]) for row in curve(tmp_path))
    assert_close(parameter_values(load_run(tmp_path).model), parameter_values(load_run(whole).model), "exact")
