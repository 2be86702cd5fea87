"""Loading holds the parameters and one tensor, and hardly more."""

import json
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
SCRIPT = """
import sys, jax
from flax import nnx
from lcr.evaluation.memory import reset_peak, resident_peak_bytes
from lcr.pretrained.load import load_model
warm, folder, dtype = sys.argv[1:]
load_model(warm, dtype=dtype, progress=False)
assert reset_peak()
before = resident_peak_bytes()
model = load_model(folder, dtype=dtype, progress=False)
peak = resident_peak_bytes() - before
print(peak, sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only there can the high-water mark be reset")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_peak_memory(tmp_path, dtype):
    fields = json.loads((GOLDEN / "config.json").read_text())
    fields |= {"vocab_size": 9000, "hidden_size": 512, "intermediate_size": 3000, "num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    family = FAMILIES["llama"]
    config, kind = ModelConfig(**family.read(Fields(fields))), np.dtype(np.float32)
    shapes = Table(config, family.lines(config)).shapes
    tensors = {name: (kind, shape) for name, shape in shapes.items()}
    write_tensors(tmp_path / "model.safetensors", tensors, lambda name: np.full(shapes[name], 0.5, kind))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(GOLDEN), str(tmp_path), dtype], capture_output=True, text=True, check=True
    )
    peak, parameters = map(int, done.stdout.split())
    largest = max(int(np.prod(shape)) * kind.itemsize for shape in shapes.values())
    assert parameters > 40e6
    assert peak <= 1.2 * parameters + largest, f"{peak / 1e6:.0f} MB for parameters of {parameters / 1e6:.0f} MB"
