"""`python -m experiments.compile_training`: its mistakes, its table, and a step for eight chips that are not there."""

import json
import os
import subprocess
import sys

import pytest
from experiments.configs.billion import MODELS, get_config
from lcr.training.config import check_keys
from pallas_kernels import targets

from tests.experiments.calling import call_program

MEMORY = {"argument": 16_000_000_000, "output": 16_100_000_000, "alias": 16_000_000_000, "temp": 8_000_000_000}
ROW = {
    "parameters": 1_300_000_000, "by": ["attention: mosaic_tpu"], "memory": MEMORY, "limit": 102_789_000_000,
    "seconds": 3.0,
}  # fmt: skip

STEP = """
import json
from experiments.abstract_step import compile_step
from experiments.configs.billion import get_config
from pallas_kernels import targets
config = get_config("mha")
with config.unlocked():
    config.model.update({"d_model": 256, "mixers": ("mha", "mha"), "d_ff": 256, "vocab_size": 512})
config.model.mixer_options = {"mha": {"num_heads": 2}}
print(json.dumps(compile_step(config, targets.find("v5p:2x2x2"), 16, 128)))
"""


@pytest.mark.parametrize("variant", MODELS)
def test_the_configurations_can_be_run_and_have_the_size_that_they_say(variant):
    import jax
    from flax import nnx
    from lcr.training.run import make_abstract_model

    config = get_config(variant)
    check_keys(config)
    parameters = jax.tree.leaves(nnx.state(make_abstract_model(config, 256), nnx.Param))
    assert 1.2e9 < sum(leaf.size for leaf in parameters) < 1.61e9


@pytest.mark.parametrize(
    "argument, said",
    [
        ("--target=v5q", "target='v5q': expected one of h100, h200"),
        ("--target=v5p:2x2", "target='v5p:2x2': expected the chips along 3 axes, such as v5p:2x2x1"),
        ("--target=h200:8", "target='h200:8': expected h200, one device"),
        ("--mixers=mamba3", "mixer='mamba3': expected one of mha, retnet, mamba"),
        ("--rows=0", "--rows=0"),
    ],
)
def test_a_mistake_is_told(capsys, argument, said):
    assert call_program("compile_training", argument) == 2
    assert said in capsys.readouterr().err.replace("flag --rows=0: ", "--rows=0")


def test_the_table_says_what_does_not_fit_or_compile_and_keeps_what_did(monkeypatch, capsys, tmp_path):
    """The compiler is a stand-in, whose rows come from `found`."""
    found = {"mha": ROW, "mamba": ROW | {"limit": 20_000_000_000}, "gla": {"error": "XlaRuntimeError: no\nmore"}}
    started = []

    def compiled(command, **_):
        task = json.loads(command[-1])
        started.append((task["target"], task["variant"]))
        return subprocess.CompletedProcess(command, 0, json.dumps(found[task["variant"]]), "")

    monkeypatch.setattr(subprocess, "run", compiled)
    monkeypatch.setattr(targets, "check_compilers", lambda target: None)
    arguments = ("--target=v5p:2x2x2", "--mixers=mha,mamba,gla", f"--json={tmp_path / 'rows.json'}")
    assert call_program("compile_training", *arguments) == 1
    printed = capsys.readouterr().out
    line = "| v5p:2x2x2 | mha | 1,300,000,000 | attention: mosaic_tpu | 16.0 + 0.1 + 8.0 = 24.1 | 103 | yes | 3 |"
    assert line in printed
    assert "v5p:2x2x2 mamba: takes 24.1 GB of a device's 20.0" in printed and "3 steps, 2 of them wrong" in printed
    assert "failed: XlaRuntimeError: no |" in printed
    found["gla"] = ROW
    assert call_program("compile_training", *arguments) == 1
    assert started == [("v5p:2x2x2", name) for name in ("mha", "mamba", "gla", "gla")]
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 3


def installed():
    try:
        targets.check_compilers(targets.find("v5p"))
    except targets.MissingCompiler:
        return False
    return True


@pytest.mark.skipif(not installed(), reason=f"needs {targets.INSTALL}")
def test_a_step_with_kernels_is_compiled_for_eight_chips():
    """JAX refuses a kernel that it would have to partition, so each is given the rows of its device alone."""
    environment = os.environ | targets.environment(targets.find("v5p"))
    done = subprocess.run([sys.executable, "-c", STEP], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["by"] == ["attention: mosaic_tpu"]
    of_state = 3 * 4 * row["parameters"] / 8
    assert of_state < row["memory"]["argument"] < 1.1 * of_state
