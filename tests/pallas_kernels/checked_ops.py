"""Ops for the tests of `pallas_kernels.check`: small Pallas kernels, of which some cannot be compiled or spill."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from pallas_kernels import devices
from pallas_kernels.check.cases import Op


class Shape(NamedTuple):
    T: int = 1


def copies(x):
    """One plus a tile at a time, by a kernel for the target's platform."""
    if devices.current().platform == "tpu":
        block = pl.BlockSpec((256, 128), lambda i: (i, 0))

        def body(x, o):
            o[...] = x[...] + 1

        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, shape, grid=(4,), in_specs=[block], out_specs=block, name="copies")(x)

    def gpu_body(x, o, tile):
        tile[...] = x[...] + 1
        mosaic_gpu.commit_smem()
        mosaic_gpu.copy_smem_to_gmem(tile, o)
        mosaic_gpu.wait_smem_to_gmem(0)

    kernel = mosaic_gpu.kernel(
        gpu_body, out_type=jax.ShapeDtypeStruct((64, 128), x.dtype), scratch_types=[mosaic_gpu.SMEM((64, 128), x.dtype)]
    )
    return kernel(x[:64])


def spills(x):
    """Holds more numbers at once than there are registers."""
    if devices.current().platform == "tpu":

        def body(x, o):
            held = [jnp.exp(x[8 * i : 8 * i + 8]) for i in range(128)]
            for i in range(128):
                o[8 * i : 8 * i + 8] = held[i] * held[127 - i] + held[(37 * i) % 128]

        return pl.pallas_call(body, jax.ShapeDtypeStruct(x.shape, x.dtype), name="spills")(x)

    def gpu_body(x, o, tile):
        held = [jnp.exp(x[i]) for i in range(8)]
        tile[...] = sum(a * b for a, b in zip(held, held[::-1], strict=True)) + sum(held)
        mosaic_gpu.commit_smem()
        mosaic_gpu.copy_smem_to_gmem(tile, o)
        mosaic_gpu.wait_smem_to_gmem(0)

    kernel = mosaic_gpu.kernel(
        gpu_body, out_type=jax.ShapeDtypeStruct((64, 128), x.dtype), scratch_types=[mosaic_gpu.SMEM((64, 128), x.dtype)]
    )
    return kernel(x.reshape(-1, 64, 128))


def ends_the_process(x):
    os.abort()


def raises(x):
    raise ValueError("no kernel for this")


ARGUMENTS = (jax.ShapeDtypeStruct((1024, 128), jnp.float32),)
OPS = {
    function.__name__: Op({"whole": Shape()}, lambda shape, function=function: (function, ARGUMENTS), ("whole",))
    for function in (copies, spills, ends_the_process, raises)
}
