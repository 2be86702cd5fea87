"""The programs, called as from a shell but in this process, on a model that compiles in a moment."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import lcr

from tests.experiments.calling import call_program

SWEEP = """
from lcr.training.config import default_config

def get_sweep(only=""):
    configs = []
    for name in only.split(",") if only else ("broken", "good"):
        config = default_config()
        config.name = name
        config.model.dtype = "float32" if name == "good" else "float99"
        config.data.lengths = (96, 100)
        config.data.batch_tokens = 200
        config.optimizer.warmup_steps = 1
        config.training.steps = 3
        config.evaluation.lengths = (96, 130)
        config.evaluation.depths = (0.0, 1.0)
        config.evaluation.samples = 2
        config.evaluation.piece = 64
        configs.append(config)
    return configs
"""


class Toy(nnx.Module):
    """Logits from the token and the sum of all before it, with the decoder's interface."""

    def __init__(self, config, *, rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config["vocab_size"], 8)))

    def init_states(self, batch, capacity):
        return {"sum": jnp.zeros((1, batch, 8))}

    def __call__(self, tokens, states=None, segment_ids=None, *, logits_at=None):
        states = self.init_states(tokens.shape[0], 0) if states is None else states
        x = self.embedding[...][tokens]
        if segment_ids is not None:
            x = jnp.where((segment_ids != 0)[..., None], x, 0.0)
        x = x + jnp.cumsum(x, axis=1) + states["sum"][0][:, None]
        final = x[:, -1] - self.embedding[...][tokens[:, -1]]
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        return jnp.einsum("btd,vd->btv", x, self.embedding[...]), {"sum": final[None]}


@pytest.fixture(scope="module")
def call():
    """call(program, *arguments) -> exit code, with models that compile in a moment."""

    def run_program(program, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(lcr, "make_model", Toy)
            return call_program(program, *arguments)

    return run_program


@pytest.fixture(scope="module")
def sweep(call, tmp_path_factory):
    """A sweep of two architectures, the first of which cannot be built: (file, workdir, exit code)."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "sweep.py").write_text(SWEEP)
    code = call("sweep", f"--sweep={folder / 'sweep.py'}", f"--workdir={folder / 'runs'}")
    return folder / "sweep.py", folder / "runs", code


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_sweep_trains_evaluates_and_reports_though_one_architecture_fails(sweep):
    _, workdir, code = sweep
    assert code == 1
    rows = read_lines(workdir / "results.jsonl")
    assert [(row["architecture"], row["length"], row["depth"]) for row in rows] == [
        ("good", length, depth) for length in (96, 130) for depth in (0.0, 1.0)
    ]
    assert {(row["checkpoint_step"], row["training_length"], row["samples"]) for row in rows} == {(3, 100, 2)}
    assert (workdir / "good" / "checkpoints" / "3").is_dir() and not (workdir / "good" / "results.jsonl").exists()
    names = sorted(path.name for path in (workdir / "report").iterdir())
    assert names == ["accuracy.png", "heatmap_good.png", "index.html", "state.png"]
    assert "float99" not in (workdir / "report" / "index.html").read_text()


def test_the_same_sweep_again_computes_nothing_and_prints_the_table(sweep, call, capfd):
    file, workdir, _ = sweep
    before = (workdir / "results.jsonl").read_bytes(), (workdir / "good" / "metrics.jsonl").read_bytes()
    assert call("sweep", f"--sweep={file}:good", f"--workdir={workdir}") == 0
    assert before == ((workdir / "results.jsonl").read_bytes(), (workdir / "good" / "metrics.jsonl").read_bytes())
    printed = capfd.readouterr()
    assert "every cell is there already" in printed.err
    for part in ("good: passkey, trained on up to 100 tokens", "all depths", "heatmap_good.png", "report/index.html"):
        assert part in printed.out


def test_a_failure_is_told_where_it_happened_and_at_the_end(sweep, call, capfd):
    file, workdir, _ = sweep
    assert call("sweep", f"--sweep={file}", f"--workdir={workdir}") == 1
    printed = capfd.readouterr()
    assert "error: broken: model.dtype='float99'" in printed.err and "the sweep goes on" in printed.err
    assert printed.err.splitlines()[-1].startswith("error: 1 of 2 architectures failed: broken: model.dtype")
    assert "Traceback" not in printed.err


def test_evaluate_takes_lengths_depths_and_samples_and_goes_on_where_it_was(sweep, call, capfd, tmp_path):
    run = sweep[1] / "good"
    arguments = ("--lengths=128", "--depths=0,0.5", "--samples=3", "--seed=9", "--batch=4", "--piece=32")
    try:
        assert call("evaluate", f"--workdir={run}", *arguments) == 0
        rows = read_lines(run / "results.jsonl")
        assert [(row["length"], row["depth"]) for row in rows] == [(128, 0.0), (128, 0.5)]
        assert {(row["samples"], row["seed"], row["batch"]) for row in rows} == {(3, 9, 3)}
        assert call("evaluate", f"--workdir={run}", "--lengths=128,1K", *arguments[1:]) == 0
        assert [row["length"] for row in read_lines(run / "results.jsonl")] == [128, 128, 1024, 1024]
        printed = capfd.readouterr()
        assert "2 cells to do" in printed.err and f"4 cells in {run / 'results.jsonl'}" in printed.out
        assert call("report", f"--workdir={run}") == 0
        assert "heatmap_good.png" in capfd.readouterr().out
        assert "&quot;lengths&quot;" in (run / "report" / "index.html").read_text()
    finally:
        (run / "results.jsonl").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "program, arguments, message",
    [
        ("evaluate", ["--workdir=missing"], "there is no config.json in it; expected the folder of a run"),
        ("evaluate", ["--workdir=x", "--lengths=12x"], "--lengths: '12x' is no length: expected a number of tokens"),
        ("evaluate", ["--workdir=x", "--lengths=0"], "--lengths: '0' is no length"),
        ("evaluate", ["--workdir=x", "--depths=0,1.5"], "--depths: '1.5' is no depth: expected a number from 0"),
        ("evaluate", ["--workdir=x", "--depths=nan"], "--depths: 'nan' is no depth"),
        (
            "evaluate",
            ["--workdir={run}", "--lengths=20"],
            "length=20 is too short for task 'passkey': expected at least",
        ),
        ("evaluate", ["--workdir={run}", "--lengths="], "lengths is empty: expected at least one"),
        ("evaluate", ["--workdir={run}", "--samples=0"], "samples=0: expected an integer above 0"),
        ("evaluate", ["--workdir={run}", "--step=2"], "step=2: there is no such checkpoint"),
        ("evaluate", ["--workdir={empty}"], "no usable checkpoint in"),
        ("evaluate", ["--workdir=x", "--samples=many"], "flag --samples=many"),
        ("evaluate", [], "--workdir"),
        ("report", ["--workdir=missing"], "workdir='missing': there is no such folder"),
        ("report", ["--workdir={empty}"], "has no rows: expected the results of an evaluation"),
        ("report", ["--workdir={spoilt}"], "results.jsonl, line 2: not JSON"),
        ("sweep", ["--workdir=x", "--sweep=missing.py"], "there is no file 'missing.py'"),
        ("sweep", ["--workdir=x", "--sweep={sweep}:good,good"], "two configurations are called 'good'"),
        ("sweep", ["--workdir=x", "--sweep={sweep}:../up"], "the name '../up' cannot be a folder's"),
        ("sweep", ["--workdir=x", "--sweep={no_sweep}"], "defines no get_sweep(only)"),
        (
            "sweep",
            ["--workdir=x", "--sweep=experiments/sweeps/passkey.py:mumba"],
            "unknown architecture 'mumba'. Did you mean 'mamba'?",
        ),
        ("sweep", ["--workdir={spoilt}", "--sweep={sweep}:good"], "results.jsonl, line 2: not JSON"),
        ("costs", ["--workdir={spoilt}", "--sweep={sweep}:good"], "results.jsonl, line 2: not JSON"),
        ("learning_rates", ["--workdir={empty}", "--sweep={sweep}:good", "--values=1e-3,fast"], "--values: 'fast':"),
    ],
)
def test_a_mistake_gets_one_clear_message(sweep, call, capfd, tmp_path, program, arguments, message):
    file, workdir, _ = sweep
    places = {"sweep": file, "run": workdir / "good", "empty": tmp_path / "empty", "spoilt": tmp_path / "spoilt"}
    places["no_sweep"] = tmp_path / "no_sweep.py"
    places["no_sweep"].write_text("")
    places["empty"].mkdir()
    (places["empty"] / "config.json").write_bytes((workdir / "good" / "config.json").read_bytes())
    places["spoilt"].mkdir()
    line = (workdir / "results.jsonl").read_text().splitlines()[0]
    (places["spoilt"] / "results.jsonl").write_text(f"{line}\n{line[:50]}\n{line}\n")
    capfd.readouterr()
    assert call(program, *(argument.format(**places) for argument in arguments)) == 2
    printed = capfd.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ") and message in printed.err and "Traceback" not in printed.err
    assert not (workdir / "good" / "results.jsonl").exists(), "nothing was computed"


def test_costs_are_measured_once_and_stand_beside_the_accuracy(sweep, call, capfd):
    file, workdir, _ = sweep
    assert call("costs", f"--sweep={file}:good", f"--workdir={workdir}", "--repeats=1") == 0
    [row] = read_lines(workdir / "costs.jsonl")
    assert (row["name"], row["state_bytes"]) == ("good", 4 * 8)
    assert row["parameters"] % 8 == 0 and row["decoding_tokens_per_second"] > 0 and row["late_over_early"] > 0
    assert row["training_tokens_per_second"] > 0
    assert 12 < row["memory_ratio"] < 17
    printed = capfd.readouterr().out
    assert "| 96 | 130 |" in printed and "| good | " in printed and " | 32 B | " in printed
    assert (workdir / "comparison.md").read_text() in printed
    assert call("costs", f"--sweep={file}:good", f"--workdir={workdir}") == 0
    assert len(read_lines(workdir / "costs.jsonl")) == 1 and printed == capfd.readouterr().out


def test_learning_rates_are_tried_once_each(sweep, call, capfd, tmp_path):
    file, _, _ = sweep
    arguments = [f"--sweep={file}:good", f"--workdir={tmp_path}", "--steps=10", "--values=1e-3,1e-1"]
    (tmp_path / "good").mkdir()  # a sweep's run, say, if somebody gives its folder
    assert call("learning_rates", *arguments) == 0
    rows = read_lines(tmp_path / "learning_rates.jsonl")
    assert [(row["name"], row["steps"], row["learning_rate"]) for row in rows] == [
        ("good", 10, 1e-3), ("good", 10, 1e-1)
    ]  # fmt: skip
    best = min(rows, key=lambda row: row["loss"])["learning_rate"]
    printed = capfd.readouterr().out
    assert printed.splitlines()[-1].split()[-1] == f"{best:g}"
    assert call("learning_rates", *arguments) == 0
    assert read_lines(tmp_path / "learning_rates.jsonl") == rows and printed == capfd.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "learning_rates.jsonl"], "no run is kept or lost"
    with (tmp_path / "learning_rates.jsonl").open("a") as stream:
        stream.write('{"name": "go')
    assert call("learning_rates", *arguments) == 2
    assert "learning_rates.jsonl, line 3 cannot be read" in capfd.readouterr().err


@pytest.mark.parametrize("program", ["evaluate", "sweep", "report", "costs", "learning_rates"])
def test_help_is_useful_and_loads_nothing_heavy(program):
    code = f"""
import runpy, sys
sys.argv = ["{program}", "--help"]
try:
    runpy.run_module("experiments.{program}", run_name="__main__", alter_sys=True)
finally:
    heavy = {{"jax", "flax", "matplotlib", "orbax", "grain"}} & set(sys.modules)
    print("HEAVY", sorted(heavy))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert f"python -m experiments.{program} --" in done.stdout and "--workdir:" in done.stdout
    assert "Exit codes:" in done.stdout and "HEAVY []" in done.stdout


def test_every_configuration_of_the_passkey_sweep_is_sound():
    from experiments.sweeps.passkey import get_sweep
    from lcr.evaluation import grid_from_config
    from lcr.training.config import check_keys

    configs = get_sweep()
    longest = {}
    for config in configs:
        check_keys(config)
        longest[config.name] = max(grid_from_config(config).lengths)
    of_mixers = {name for config in configs for name in config.model.mixers}
    assert of_mixers == set(lcr.MIXERS) and "jamba" in longest
    assert longest.pop("mamba") == 1 << 20 and set(longest.values()) == {65_536}
    assert [config.name for config in get_sweep("gqa, mamba")] == ["gqa", "mamba"]
