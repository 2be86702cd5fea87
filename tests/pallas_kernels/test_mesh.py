"""Ops in a program for eight devices, which takes a process of its own; and without a mesh.

By their references, which compile fastest: what is spread is the call, whatever it calls.
"""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pallas_kernels
import pytest
from jax.sharding import AxisType, PartitionSpec
from pallas_kernels import mesh
from pallas_kernels.tolerances import assert_close

from tests.compiling import UNOPTIMIZED

T, HEADS, KEYS, VALUES = 5, 4, 3, 2
IDS = (1, 1, 2, 2, 0)
BY = {"implementation": "reference"}


def real(*shape):
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def decays(*shape):
    return -np.exp(real(*shape))


def ids(rows):
    return np.tile(np.int32(IDS), (rows, 1))


def attention(rows, kv_heads):
    q, k, v = real(rows, T, HEADS, KEYS), real(rows, T, kv_heads, KEYS), 2 * real(rows, T, kv_heads, KEYS)

    def call(q, k, v):
        options = BY | {"alibi_slopes": jnp.linspace(0.1, 0.4, HEADS), "return_logsumexp": True}
        o, logsumexp = pallas_kernels.attention(q, k, v, segment_ids=jnp.asarray(ids(rows)), **options)
        return o, jnp.where(jnp.isfinite(logsumexp), logsumexp, 0)

    return call, (q, k, v)


def linear_attention(rows, groups):
    q, k, v = real(rows, T, groups, KEYS), 2 * real(rows, T, groups, KEYS), real(rows, T, HEADS, VALUES)

    def call(q, k, v, log_decay, bonus, initial_state):
        options = {"bonus": bonus, "initial_state": initial_state, "segment_ids": jnp.asarray(ids(rows)), **BY}
        return pallas_kernels.linear_attention(q, k, v, log_decay, **options)

    return call, (q, k, v, decays(HEADS), real(HEADS, KEYS), real(rows, HEADS, KEYS, VALUES))


def delta_rule(rows):
    q, a = real(rows, T, HEADS, KEYS), 0.1 * real(rows, T, HEADS, KEYS)

    def call(q, k, v, a, b, log_decay, initial_state):
        return pallas_kernels.delta_rule(q, k, v, a, b, log_decay, initial_state=initial_state, **BY)

    return call, (q, q, real(rows, T, HEADS, VALUES), a, -a, decays(rows, T, HEADS), real(rows, HEADS, KEYS, VALUES))


def selective_scan(rows):
    x, B = real(rows, T, HEADS), real(rows, T, KEYS)

    def call(x, dt, A, B, C, D, gate):
        return pallas_kernels.selective_scan(x, dt, A, B, C, D, gate=gate, segment_ids=jnp.asarray(ids(rows)), **BY)

    return call, (x, np.exp(x), decays(HEADS, KEYS), B, 2 * B, real(HEADS), real(rows, T, HEADS))


def wkv(rows):
    def call(k, v, log_decay, bonus):
        return pallas_kernels.wkv(k, v, log_decay, bonus, **BY)

    return call, (real(rows, T, HEADS), 2 * real(rows, T, HEADS), decays(HEADS), real(HEADS))


CASES = {  # name: (shape of the mesh, its axes, the call, how `o` is spread)
    "attention, rows over two axes": ((2, 2, 2), ("a", "b", "model"), attention(4, 2), (("a", "b"), None, "model")),
    "attention, a head of keys, rows that do not divide": (
        (2, 4), ("data", "model"), attention(3, 1), (None, None, "model"),
    ),
    "attention, heads that do not divide": ((2, 4), ("data", "model"), attention(2, 2), ("data",)),
    "linear attention, one group": ((2, 4), ("data", "model"), linear_attention(2, 1), ("data", None, "model")),
    "delta rule": ((4, 2), ("data", "model"), delta_rule(4), ("data", None, "model")),
    "selective scan": ((2, 4), ("data", "model"), selective_scan(2), ("data", None, "model")),
    "wkv": ((4, 2), ("data", "model"), wkv(4), ("data", None, "model")),
}  # fmt: skip


def with_gradients(call):
    """A function that gives the results and the gradients of all arguments, for cotangents that differ everywhere."""

    def run(*arguments):
        results, pullback = jax.vjp(call, *arguments)
        cotangents = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), results)
        return results, pullback(cotangents)

    return run


def check_case(shape, names, call_and_arguments, spread):
    call, arguments = call_and_arguments
    run = with_gradients(call)
    expected = jax.jit(run)(*arguments)
    over = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    with jax.set_mesh(over):
        got = jax.jit(lambda *arguments: run(*arguments))(*arguments)
    assert got[0][0].sharding.spec == PartitionSpec(*spread), got[0][0].sharding
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert_close(np.asarray(one), np.asarray(other), kind="float32")


def check_manual():
    """Inside of a `shard_map` over all axes nothing is spread again; of one over some axes, over the others."""
    arguments = attention(8, 2)[1]
    expected = pallas_kernels.attention(*map(jnp.asarray, arguments), **BY)

    def mapped(over):
        rows = PartitionSpec(over)
        return jax.shard_map(
            lambda *arguments: pallas_kernels.attention(*arguments, **BY), in_specs=(rows,) * 3, out_specs=rows,
            axis_names=set(over), check_vma=False,
        )  # fmt: skip

    with jax.set_mesh(jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)):
        assert str(jax.make_jaxpr(mapped(("data", "model")))(*arguments)).count("shard_map") == 1
        assert str(jax.make_jaxpr(mapped(("data",)))(*arguments)).count("shard_map") == 2
        got = jax.jit(mapped(("data",)))(*arguments)
    assert_close(np.asarray(got), np.asarray(expected), kind="float32")


def check(names):
    """What the process of its own does."""
    assert jax.device_count() == 8
    for name in names:
        try:
            check_manual() if name == "manual" else check_case(*CASES[name])
        except Exception as error:
            raise AssertionError(name) from error


def test_eight_devices_give_what_one_gives():
    """Outputs and all gradients, those of arguments that all rows share among them."""
    environment = os.environ | UNOPTIMIZED | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"
    }  # fmt: skip
    script = "import json, sys; from tests.pallas_kernels.test_mesh import check; check(json.loads(sys.argv[1]))"
    command = [sys.executable, "-c", script, json.dumps([*CASES, "manual"])]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("around", [None, 1])
def test_without_several_devices_nothing_is_mapped(around):
    call, arguments = attention(8, 2)
    if around is None:
        traced = jax.make_jaxpr(lambda *a: call(*a))(*arguments)
    else:
        with jax.set_mesh(jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])):
            traced = jax.make_jaxpr(lambda *a: call(*a))(*arguments)
    assert "shard_map" not in str(traced)


def test_every_op_says_the_axes_of_all_that_it_hands_on():
    """An argument too many or too few would be an error only where there is a mesh."""
    axes = mesh.Axes("BT", "", results=("BT",))
    with pytest.raises(ValueError, match="3 arguments beside the axes of 2"):
        mesh.on_each_device(lambda *arguments: arguments, (1, 2, 3), axes)
