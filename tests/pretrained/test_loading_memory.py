"""Loading holds the parameters and one tensor, and hardly more, whatever their sharding; which changes no number."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from lcr.models.config import ModelConfig
from lcr.pretrained.families import FAMILIES
from lcr.pretrained.fields import Fields
from lcr.pretrained.safetensors import write_tensors
from lcr.pretrained.tensors import Table

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "pretrained" / "llama_gqa"
SHARDED = """
import jax, numpy as np, sys
mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
def along(axis):
    def choose(name, shape):
        split = len(shape) > 1 and shape[axis] % 2 == 0
        parts = ["x" if split and a == axis % len(shape) else None for a in range(len(shape))]
        return jax.sharding.NamedSharding(mesh, jax.P(*parts))
    return choose
"""
SCRIPT = SHARDED + """
from flax import nnx
from lcr.evaluation.memory import reset_peak, resident_peak_bytes
from lcr.pretrained.load import load_model
warm, folder, dtype, axis = sys.argv[1:]
sharding = None if axis == "none" else along(int(axis))
load_model(warm, dtype=dtype, sharding=sharding, progress=False)
assert reset_peak()
before = resident_peak_bytes()
model = load_model(folder, dtype=dtype, sharding=sharding, progress=False)
peak = resident_peak_bytes() - before
print(peak, sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))))
"""
EQUAL = SHARDED + """
from flax import nnx
from lcr.pretrained.load import load_model
for folder in sys.argv[1:]:
    whole = nnx.to_flat_state(nnx.state(load_model(folder, progress=False), nnx.Param))
    for axis in (-1, -2, 0):
        pieces = nnx.to_flat_state(nnx.state(load_model(folder, sharding=along(axis), progress=False), nnx.Param))
        for (path, one), (_, other) in zip(whole, pieces, strict=True):
            one, other = np.asarray(one[...]), np.asarray(other[...])
            np.testing.assert_array_equal(one, other, err_msg=f"{folder} {path} {axis}")
        assert axis == 0 or any(not other[...].is_fully_replicated for _, other in pieces)
"""


def in_two_devices(script, *arguments):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_sharding_changes_no_number():
    """Parts of tensors, experts, fused projections, and heads that are split: each along every axis."""
    cases = ("llama_gqa", "fla_retnet", "fla_rwkv7", "mixtral", "phi3_longrope", "fla_delta_net")
    in_two_devices(EQUAL, *(GOLDEN.with_name(case) for case in cases))


@pytest.mark.skipif(sys.platform != "linux", reason="only there can the high-water mark be reset")
@pytest.mark.parametrize(
    ("dtype", "axis"), [("float32", "none"), ("bfloat16", "none"), ("float32", -1), ("bfloat16", -2)]
)
def test_peak_memory(tmp_path, dtype, axis):
    fields = json.loads((GOLDEN / "config.json").read_text())
    fields |= {"vocab_size": 9000, "hidden_size": 512, "intermediate_size": 3000, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    family = FAMILIES["llama"]
    config, kind = ModelConfig(**family.read(Fields(fields))), np.dtype(np.float32)
    shapes = Table(config, family.lines(config)).shapes
    tensors = {name: (kind, shape) for name, shape in shapes.items()}
    write_tensors(tmp_path / "model.safetensors", tensors, lambda name: np.full(shapes[name], 0.5, kind))
    peak, parameters = map(int, in_two_devices(SCRIPT, GOLDEN, tmp_path, dtype, axis).split())
    largest = max(int(np.prod(shape)) * kind.itemsize for shape in shapes.values())
    assert parameters > 40e6
    assert peak <= 1.2 * parameters + largest, f"{peak / 1e6:.0f} MB for parameters of {parameters / 1e6:.0f} MB"
