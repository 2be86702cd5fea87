"""A step over eight devices, which takes a process of its own, makes of a state what it makes on one."""

import os
import subprocess
import sys

import jax
import lcr
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from lcr.training import sharding
from lcr.training.config import default_config
from lcr.training.optimizer import make_optimizer, parameter_groups
from lcr.training.step import Functional, init_state, make_step, parameter_values, select_predictions
from pallas_kernels.tolerances import assert_close

from tests.compiling import UNOPTIMIZED

VOCABULARY, ROWS, LENGTH = 24, 8, 6
BY = {"mixer_options": {"gqa": {"implementation": "reference"}}}  # which compiles fastest


def model():
    config = {"vocab_size": VOCABULARY, "d_model": 16, "mixers": ("gqa", "gqa"), "d_ff": 32, **BY}
    return lcr.make_model(config, rngs=nnx.Rngs(0))


def batch():
    tokens = np.random.default_rng(0).integers(1, VOCABULARY, (ROWS, LENGTH), np.int32)
    return select_predictions({"tokens": tokens, "loss_mask": np.ones(tokens.shape, np.bool_)})


def step_and_state():
    one = model()
    functional = Functional(one)
    optimizer = make_optimizer(default_config().optimizer, 10, parameter_groups(functional.variables))
    return make_step(functional, optimizer), init_state(parameter_values(one), optimizer, functional)


def check():
    """What the process of its own does."""
    sharding.LARGE = 64
    step, state = step_and_state()
    expected = jax.device_get(step(state, batch()))
    step, state = step_and_state()
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    over = sharding.state_shardings(state, mesh)
    state, rows = jax.device_put(state, over), jax.device_put(batch(), sharding.batch_shardings(batch(), mesh))
    with jax.set_mesh(mesh):
        state = step(state, rows)
    flat, _ = jax.tree.flatten_with_path(state)
    for (path, one), other, where in zip(flat, jax.tree.leaves(expected), jax.tree.leaves(over), strict=True):
        assert one.sharding.is_equivalent_to(where, one.ndim), (path, one.sharding, where)
        if one.dtype == np.float32:
            assert_close(np.asarray(one), other, kind="float32")
        else:
            np.testing.assert_array_equal(np.asarray(one), other)


def test_eight_devices_make_the_step_of_one():
    environment = os.environ | UNOPTIMIZED | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    script = "from tests.training.test_sharding import check; check()"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_large_parameters_and_their_moments_are_cut_and_stacked_layers_are_not_parted():
    mesh = jax.sharding.AbstractMesh((8,), ("data",))
    shapes = {
        "embedding": (1000, 2048),
        "groups.blocks.0.mlp.down.kernel": (24, 5632, 2048),
        "groups.blocks.0.mixer.A_log": (48, 4096, 16),
        "groups.blocks.0.mixer_norm.scale": (24, 2048),
        "odd": (1001, 333),
    }
    parameters = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in shapes.items()}
    found = sharding.state_shardings({"parameters": parameters, "optimizer": ({"mu": parameters},)}, mesh)
    assert found["parameters"] == found["optimizer"][0]["mu"]
    assert {name: where.spec for name, where in found["parameters"].items()} == {
        "embedding": PartitionSpec(None, "data"),
        "groups.blocks.0.mlp.down.kernel": PartitionSpec(None, "data", None),
        "groups.blocks.0.mixer.A_log": PartitionSpec(None, "data", None),
        "groups.blocks.0.mixer_norm.scale": PartitionSpec(),
        "odd": PartitionSpec(),
    }
