"""A tile of tokens in shared memory: how it comes there, what is made of it, and one step of the recurrence from it."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.selective_scan.mosaic_gpu_plan import F32, LINES, WORDS, Plan, along_columns, along_lines
from pallas_kernels.selective_scan.reference import silu_derivative

BY_CHANNEL = ("x", "dt", "dy", "gate")  # [B, T, D]
BY_STATE = ("B", "C")  # [B, T, N]


def scratch(plan: Plan, stages: int, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    """Shared memory for so many tiles of the arrays (`carries` among them where documents are packed), the barriers on
    which they come, and float32 for what a tile's steps read."""
    found = {}
    for name, array in arrays.items():
        columns = plan.channels if name in BY_CHANNEL else plan.states
        shape = (max(plan.tokens, WORDS),) if name == "carries" else (plan.tokens, columns)
        found[name] = plgpu.SMEM((stages, *shape), array.dtype)
    for name in BY_STATE:
        if name in arrays:
            found[f"{name}_float"] = plgpu.SMEM((plan.tokens, plan.states), F32)
    found["input"] = plgpu.SMEM((plan.tokens, plan.channels), F32)
    found["here"] = plgpu.Barrier(num_arrivals=len(arrays), num_barriers=stages)
    return found


def fetch(plan: Plan, arrays: dict[str, Any], shared: dict[str, Any], row: Any, block: Any, n: Any, slot: Any) -> None:
    """Starts the copies of tile n of a row into a slot."""
    tokens, channels = pl.ds(n * plan.tokens, plan.tokens), pl.ds(block * plan.channels, plan.channels)
    for name, array in arrays.items():
        if name == "carries":
            part = array.at[row, n]
        elif name in BY_CHANNEL:
            part = array.at[row, tokens, channels]
        else:
            part = array.at[row, tokens]
        plgpu.copy_gmem_to_smem(part, shared[name].at[slot], shared["here"].at[slot])


class Tile:
    """The tile in one slot. Tokens of padding are made harmless in place: they have dt = 0, and nothing else either.
    Where there is a gate z, dy becomes dy silu(z), and z then dy silu'(z), what the ungated y is multiplied by for dz.

    input: float32 [tokens, channels] in shared memory, dt x (or dy); free for results once it was read.
    """

    def __init__(self, plan: Plan, shared: dict[str, Any], slot: Any):
        self.plan = plan
        self.input = shared["input"]
        self.arrays = {name: shared[name].at[slot] for name in (*BY_CHANNEL, *BY_STATE, "carries") if name in shared}
        self.floats = {name: shared[f"{name}_float"] for name in BY_STATE if name in shared}

    @property
    def packed(self) -> bool:
        return "carries" in self.arrays

    def stretches(self) -> list[tuple[Any, Any]]:
        """Where [tokens, channels] is worked on at a time."""
        return [(pl.ds(t, self.plan.stretch), slice(None)) for t in range(0, self.plan.tokens, self.plan.stretch)]

    def read(self, name: str, at: tuple[Any, Any]) -> jax.Array:
        """A stretch of an array, in float32; of padding 0."""
        values = plgpu.load(self.arrays[name].at[*at], layout=self.plan.of_channels).astype(F32)
        if not self.packed:
            return values
        return jnp.where(self.valid(at[0], self.plan.channels, self.plan.of_channels), values, 0.0)

    def write(self, name: str, at: tuple[Any, Any], values: jax.Array) -> None:
        self.arrays[name][*at] = values.astype(self.arrays[name].dtype)

    def valid(self, tokens: Any, columns: int, layout: Any) -> jax.Array:
        carries = plgpu.load(self.arrays["carries"].at[tokens], layout=layout.reduce(1))
        return along_lines(carries >= 0, columns, layout)

    def prepare(self) -> None:
        """Makes `input` and the weights in float32. A barrier has to come next."""
        for at in self.stretches():
            if "gate" in self.arrays and "dy" in self.arrays:
                dy, z = self.read("dy", at), self.read("gate", at)
                self.write("dy", at, dy * jax.nn.silu(z))
                self.write("gate", at, dy * silu_derivative(z))
            elif self.packed and "dy" in self.arrays:
                self.write("dy", at, self.read("dy", at))
            if self.packed:
                self.write("dt", at, self.read("dt", at))
            self.input[*at] = self.read("dt", at) * self.read("x", at) if "x" in self.arrays else self.read("dy", at)
        for name, floats in self.floats.items():
            values = plgpu.load(self.arrays[name], layout=self.plan.of_weights).astype(F32)
            if self.packed:
                valid = self.valid(pl.ds(0, self.plan.tokens), self.plan.states, self.plan.of_weights)
                values = jnp.where(valid, values, 0.0)
            floats[...] = values

    def row(self, reference: Any, t: Any) -> dict[int, jax.Array]:
        """A token's numbers of channels in float32 [32], by first channel."""
        layout = self.plan.of_states.reduce(1)
        return {r: plgpu.load(reference.at[t, pl.ds(r, LINES)], layout=layout).astype(F32) for r in self.plan.lines}

    def channels(self, reference: Any, t: Any) -> list[jax.Array]:
        """A token's numbers of channels in float32, for each matrix of states."""
        return self.plan.spread(self.row(reference, t))

    def weights(self, name: str, t: Any) -> list[jax.Array]:
        """B or C of a token, for each matrix of states."""
        plan = self.plan
        whole = {}
        for n in range(0, plan.states, plan.columns):
            value = plgpu.load(self.floats[name].at[t, pl.ds(n, plan.columns)], layout=plan.of_states.reduce(0))
            whole[n] = along_columns(value, LINES, plan.of_states)
        return [whole[n] for _, n in plan.matrices]

    def decays(self, t: Any, dt: list[jax.Array], A: list[jax.Array]) -> list[jax.Array]:
        """exp(dt A) of a token, 0 where a document begins. A: times log2(e)."""
        found = [jnp.exp2(dt_ * A_) for dt_, A_ in zip(dt, A, strict=True)]
        if not self.packed:
            return found
        carried = jnp.abs(self.arrays["carries"][t])
        return [a * carried for a in found]
