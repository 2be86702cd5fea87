"""`python -m pallas_kernels.benchmark`, at sizes that a CPU can do."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
from compiling import UNOPTIMIZED
from pallas_kernels.attention.shapes import Shape
from pallas_kernels.benchmark import attention, scan, scan_models


def benchmark(*arguments):
    command = [sys.executable, "-m", "pallas_kernels.benchmark", *arguments]
    return subprocess.run(command, env=os.environ | UNOPTIMIZED | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)


def test_rows_are_timed_and_saved(tmp_path):
    ended = benchmark("attention", "--lengths=64", "--quick", f"--out={tmp_path / 'measured.json'}")
    assert ended.returncode == 0, ended.stderr
    saved = json.loads((tmp_path / "measured.json").read_text())
    assert saved["device"] == "cpu" and saved["versions"]["jax"] and saved["date"]
    assert saved["peaks"]["matrix product"] > 1e8 and saved["peaks"]["copy"] > 1e7
    assert [row["pass"] for row in saved["rows"]] == ["decoding", "decoding", "forward"]
    assert all(row["lcr"] > 0 and row["by"] == "chunked" for row in saved["rows"])
    assert ended.stdout.count("\n| GQA 32 / 8 x 128, decoding | 64 |") == 1


def test_what_the_time_does_not_suffice_for_is_named(tmp_path):
    ended = benchmark("attention", "--lengths=64", "--quick", "--budget=1", f"--out={tmp_path / 'measured.json'}")
    assert "not run, for want of time (1 s):\n  GQA 32 / 8 x 128, decoding, 64 tokens, decoding" in ended.stdout


def test_mistakes_are_told(tmp_path):
    ended = benchmark("atention")
    assert (
        ended.returncode == 2
        and "part='atention': expected one of attention, scan. Did you mean 'attention'?" in ended.stderr
    )
    ended = benchmark("attention", "--lengths=2k")
    assert ended.returncode == 2 and "--lengths=2k: expected numbers of tokens" in ended.stderr


def test_the_aims_come_first_and_work_is_counted():
    rows = attention.rows(attention.LENGTHS)
    assert len(rows) == len(attention.LENGTHS) * (2 * len(attention.VARIANTS) + len(attention.DECODING))
    first = rows[:6]
    assert {row.length for row in first} == {16_384, 131_072} and {row.what for row in first if row.shape.T == 1} == {
        "decoding"
    }
    full = attention.Row("", 128, Shape(B=2, T=128, H=4, G=4, K=64, causal=False), backward=True)
    assert full.work == 3.5 * 4 * 2 * 4 * 128 * 128 * 64
    decoding = attention.Row("", 128, Shape(B=2, T=1, S=128, H=4, G=2, K=64))
    assert decoding.work == 2 * 2 * 128 * 2 * (64 + 64)
    latent = attention.Row("", 128, Shape(B=2, T=1, S=128, H=4, G=1, K=96, V=64), latent=True)
    assert latent.work == 2 * 2 * 128 * 96


def test_scans_are_timed_beside_attention(tmp_path):
    ended = benchmark("scan", "--lengths=16", "--quick", f"--out={tmp_path / 'measured.json'}")
    assert ended.returncode == 0, ended.stderr
    rows = json.loads((tmp_path / "measured.json").read_text())["rows"]
    assert [row["model"] for row in rows] == ["Mamba", "RetNet", "Mamba-2"]
    assert all(row["by"] == "chunked" and row["lcr"] == row["chunked"] > 0 for row in rows)
    assert all(row["attention / lcr"] > 0 and 0 < row["least / lcr"] < 1 for row in rows)
    assert "less time than attention" in ended.stdout


def test_every_model_is_a_call_of_its_op():
    """Shapes alone: outputs as wide as the model says, gradients of every input."""
    for name, model in scan_models.MODELS.items():
        names = set(model.sizes(2, 32))
        arguments = jax.eval_shape(lambda model=model: tuple(scan_models.inputs(model, 2, 32, jnp.bfloat16, 0).values()))
        o = jax.eval_shape(model.run, *arguments)
        assert o.shape[:2] == (2, 32) and o.size == 2 * 32 * model.width, name
        for package, wanted in (("jla", model.jla[1]), ("fla", model.fla[1])):
            assert set(wanted) <= names, (name, package)
    assert len(scan.rows(scan.LENGTHS)) == 2 * len(scan.LENGTHS) * len(scan_models.MODELS)
    assert {row.length for row in scan.rows(scan.LENGTHS)[:32]} == {8_192, 262_144}


def test_the_least_time_counts_bytes_and_operations():
    peaks = {"copy": 1e9, "matrix product": 1e30}
    row = scan.Row("DeltaNet", 64, 2, backward=False)
    tokens, width = 2 * 64, 16 * 128
    assert scan.least(row, peaks) == 4 * tokens * (3 * width + 16 + width) / 1e9  # q, unit, v, beta; o; float32 on a CPU
    both = scan.Row("DeltaNet", 64, 2, backward=True)
    assert scan.least(both, peaks) == 2 * scan.least(row, peaks)
    peaks = {"copy": 1e30, "matrix product": 1e9}
    assert scan.least(row, peaks) == 4 * 2 * tokens * 16 * 128 * 128 / 1e9
