"""Rotary positions (RoPE, arXiv 2104.09864): pairs of channels turned by an angle that grows with the position.

Channel pair i of a query or key at position p is turned by the angle `p * inverse_frequencies[i]`, so that the
product of a query and a key depends on the distance between them alone. What the members of the family (linear
and NTK scaling, YaRN, Llama 3, RetNet's rotation) differ in is the frequencies: see `rope_scaling`, or give `rotate`
other ones.
"""

import jax.numpy as jnp
import numpy as np

from lcr.layers.rope_scaling import RopeScaling
from lcr.layers.rope_scaling import rope_frequencies as rope_frequencies
from lcr.typing import Array, Float, Int


def apply_rope(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    *,
    base: float = 10_000.0,
    scaling: RopeScaling = RopeScaling(),
    length: int | None = None,
    interleaved: bool = False,
) -> Float[Array, "B T H K"]:
    """RoPE with the frequencies of the paper, or with scaled ones; see `rotate`.

    length: how many tokens attention is to reach over, for a scaling that depends on it; None: those of `x`.
    """
    frequencies = scaling.frequencies(x.shape[-1], base, x.shape[1] if length is None else length)
    return rotate(x, positions, frequencies, magnitude=scaling.magnitude, interleaved=interleaved)


def rotate(
    x: Float[Array, "B T H K"],
    positions: Int[Array, "B T"],
    inverse_frequencies: np.ndarray,
    *,
    magnitude: float = 1.0,
    interleaved: bool = False,
) -> Float[Array, "B T H K"]:
    """Turns pair i of the channels of `x` by `positions * inverse_frequencies[i]`.

        (a, b) -> magnitude (a cos - b sin, b cos + a sin)

    x: any float dtype; the rotation is computed in float32 (float64 for float64) and cast back.
    positions: any int32, negative ones too; angles are right to 1e-6 at every one of them.
    inverse_frequencies: float64 `[K / 2]`, radians per token, known when the function is traced.
    interleaved: pairs are channels (2 i, 2 i + 1), as in the paper; otherwise (i, i + K / 2), as in GPT-NeoX and
        Llama. The two differ by a permutation of the channels.

    Raises ValueError if the frequencies are not one for each pair of channels.
    """
    width = x.shape[-1]
    if width % 2 or np.shape(inverse_frequencies) != (width // 2,):
        raise ValueError(
            f"inverse_frequencies of shape {np.shape(inverse_frequencies)} for x of width {width}: "
            "expected one frequency for each pair of channels, and an even width"
        )
    result_dtype, dtype = x.dtype, np.promote_types(x.dtype, np.float32)
    angle = _angles(positions, np.asarray(inverse_frequencies, np.float64), dtype)[:, :, None, :]
    cos, sin = magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)
    x = x.astype(dtype)
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], width // 2, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    else:
        a, b = x[..., : width // 2], x[..., width // 2 :]
        turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return turned.astype(result_dtype)


def _angles(positions: Int[Array, "B T"], frequencies: np.ndarray, dtype) -> Float[Array, "B T N"]:
    """`positions * frequencies` less whole turns, in `dtype`.

    A float32 product is off by 0.03 radians at a million tokens. So the frequency is written as a fixed-point
    fraction of a turn in units of 2^-32, and multiplied in wrapping 32-bit integers: whole turns fall off at the
    top, exactly. What the unit cut off the frequency is less than one unit per token, and added in float32.
    """
    if dtype == jnp.float64:
        return positions[:, :, None].astype(dtype) * jnp.asarray(frequencies, dtype)[None, None, :]
    units = np.mod(frequencies / (2 * np.pi), 1.0) * 2.0**32
    whole = np.floor(units)
    turns = positions[:, :, None].astype(jnp.uint32) * jnp.asarray(whole.astype(np.uint32))[None, None, :]
    rest = positions[:, :, None].astype(jnp.float32) * jnp.asarray((units - whole).astype(np.float32))[None, None, :]
    turns = turns.astype(jnp.int32) + jnp.round(rest).astype(jnp.int32)
    return turns.astype(jnp.float32) * np.float32(2 * np.pi / 2.0**32)
