"""Frequencies of RoPE, and how they are scaled for contexts longer than those of training.

The members of the family and the names of their fields are those of `rope_parameters` (once `rope_scaling`) in the
configurations of Hugging Face, as a mapping:

    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}

`read_rope_scaling` checks such a mapping and gives the dataclass that computes. Below, w_i = base^(-2 i / K) is the
frequency of channel pair i in radians per token, and L the original length: that of training.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax.core import FrozenDict

from lcr.checks import check_choice, check_positive, check_whole, unknown_name


def rope_frequencies(width: int, base: float = 10_000.0) -> np.ndarray:
    """`base ** (-2 i / width)` for i in 0 .. width/2 - 1 (arXiv 2104.09864, 3.3.2), radians per token; float64."""
    return np.float64(base) ** (-np.arange(0, width, 2, dtype=np.float64) / width)


def check_rope_base(base: object) -> None:
    """Raises: ValueError for a base that is no number above 1: the pairs would turn no slower, or ever faster."""
    check_positive(rope_base=base)
    if base <= 1:
        raise ValueError(f"rope_base={base!r}: expected a number above 1, such as 10000.0")


def mscale(factor: float, weight: float = 1.0) -> float:
    """`0.1 weight ln(factor) + 1`: how much YaRN sharpens attention (arXiv 2309.00071, section 3.4)."""
    return 0.1 * weight * math.log(factor) + 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """No scaling, and what all kinds have.

    Tokens are counted by `length`: how many of them attention is to reach over, of which only `DynamicNTK` and
    `LongRope` make use.
    """

    def frequencies(self, width: int, base: float, length: int) -> np.ndarray:
        """Float64 `[width / 2]`, in radians per token."""
        return rope_frequencies(width, base)

    by_length = False  # whether the frequencies depend on `length`

    @property
    def magnitude(self) -> float:
        """What cos and sin are multiplied with; scores grow by its square."""
        return 1.0

    @property
    def softmax_factor(self) -> float:
        """What multi-head latent attention multiplies the scale of its scores with (those of `magnitude` apart)."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(RopeScaling):
    """Position interpolation (arXiv 2306.15595, section 2.3): w_i / factor, as if tokens stood closer together."""

    factor: float

    def frequencies(self, width: int, base: float, length: int) -> np.ndarray:
        return rope_frequencies(width, base) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicNTK(RopeScaling):
    """Dynamic NTK-aware interpolation (arXiv 2309.00071, section 3.3, in the form of Hugging Face): a larger base,

        base' = base (factor length / L - (factor - 1))^(K / (K - 2))        for length > L, else base.

    `length` must be known before the first token, or cached keys would have been turned by other frequencies than
    later queries. So it is what the state has room for, and without a state the tokens of the call: then the whole
    equals the pieces, and a call without a state equals the published form.
    """

    factor: float
    original_max_position_embeddings: int
    by_length = True

    def frequencies(self, width: int, base: float, length: int) -> np.ndarray:
        if width < 4:
            raise ValueError(f"rope_scaling: 'dynamic' with a rotated width of {width}: expected one of at least 4")
        ratio = max(length, self.original_max_position_embeddings) / self.original_max_position_embeddings
        grown = base * (self.factor * ratio - (self.factor - 1)) ** (width / (width - 2))
        return rope_frequencies(width, grown)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn(RopeScaling):
    """YaRN (arXiv 2309.00071, section 3): slow pairs are interpolated, fast ones are not, with a ramp between them.

        w_i' = (1 - r_i) w_i + r_i w_i / factor,    r_i = clip((i - low) / (high - low), 0, 1)

    low and high are the (fractional) pairs that turn `beta_fast` and `beta_slow` times within L tokens, rounded
    outwards to whole ones (if `truncate`) and held to 0 and K - 1:

        pair(turns) = K ln(L / (2 pi turns)) / (2 ln base)

    cos and sin are multiplied by `attention_factor`; by default that is mscale(factor), or where `mscale` and
    `mscale_all_dim` are both given (DeepSeek) mscale(factor, mscale) / mscale(factor, mscale_all_dim). Multi-head
    latent attention has its scores multiplied by mscale(factor, mscale_all_dim)^2 as well.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"rope_scaling: beta_fast={self.beta_fast} beside beta_slow={self.beta_slow}: expected more turns "
                "for the fast end of the ramp than for the slow one"
            )

    def frequencies(self, width: int, base: float, length: int) -> np.ndarray:
        whole = self.original_max_position_embeddings

        def pair(turns: float) -> float:
            return width * math.log(whole / (2 * math.pi * turns)) / (2 * math.log(base))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        steps = np.arange(width // 2, dtype=np.float64) - low
        ramp = np.clip(steps / (high - low if high != low else 1e-3), 0, 1)
        plain = rope_frequencies(width, base)
        return (1 - ramp) * plain + ramp * plain / self.factor

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return mscale(self.factor, self.mscale) / mscale(self.factor, self.mscale_all_dim)
        return mscale(self.factor)

    @property
    def softmax_factor(self) -> float:
        return mscale(self.factor, self.mscale_all_dim or 0.0) ** 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3(RopeScaling):
    """Llama 3.1's scaling (arXiv 2407.21783; the formula is that of the released code).

        w_i' = (1 - r_i) w_i / factor + r_i w_i,    r_i = clip((L w_i / (2 pi) - low) / (high - low), 0, 1)

    so pairs that turn fewer than low = `low_freq_factor` times within L are interpolated, those that turn more than
    high = `high_freq_factor` times are left alone.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self):
        if not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: high_freq_factor={self.high_freq_factor} beside low_freq_factor="
                f"{self.low_freq_factor}: expected a larger one"
            )

    def frequencies(self, width: int, base: float, length: int) -> np.ndarray:
        plain = rope_frequencies(width, base)
        turns = self.original_max_position_embeddings * plain / (2 * np.pi)
        kept = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0, 1)
        return (1 - kept) * plain / self.factor + kept * plain


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope(RopeScaling):
    """LongRoPE (arXiv 2402.13753), as Phi-3 has it: each pair's frequency is divided by a factor of its own,

        w_i' = w_i / long_factor_i      for length > L, else    w_i / short_factor_i

    with `length` as in `DynamicNTK`. cos and sin are multiplied by `attention_factor`; by default, and for a factor
    above 1, that is sqrt(1 + ln(factor) / ln(L)), where factor is the new length over L.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    factor: float = 1.0
    attention_factor: float | None = None
    by_length = True

    def frequencies(self, width: int, base: float, length: int) -> np.ndarray:
        name = "long_factor" if length > self.original_max_position_embeddings else "short_factor"
        factors = np.asarray(getattr(self, name), np.float64)
        if factors.shape != (width // 2,):
            raise ValueError(f"rope_scaling: {len(factors)} numbers in {name}: expected {width // 2}, one a pair")
        return rope_frequencies(width, base) / factors

    @property
    def magnitude(self) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position_embeddings))


ROPE_TYPES: dict[str, type[RopeScaling]] = {
    "default": RopeScaling,
    "linear": Linear,
    "dynamic": DynamicNTK,
    "yarn": Yarn,
    "llama3": Llama3,
    "longrope": LongRope,
}


def read_rope_scaling(fields: Mapping[str, Any] | None) -> RopeScaling:
    """The scaling that a mapping describes; None, and the type "default", scale nothing.

    The type stands under "rope_type" (or "type", its older name); fields that are None count as left out. The base,
    which Hugging Face also keeps there as "rope_theta", is an option of its own (`rope_base`).

    Raises: ValueError for a mapping without a type, an unknown type or field (naming the nearest), a field that is
    missing, and a value that is out of range: factors of at least 1, the others above 0 (`mscale`s may be 0).
    """
    if fields is None:
        return RopeScaling()
    if not isinstance(fields, Mapping):
        raise ValueError(f"rope_scaling={fields!r}: expected a mapping, as {{'rope_type': 'linear', 'factor': 4.0}}")
    given = {name: value for name, value in dict(fields).items() if value is not None}
    names = [given.pop(key) for key in ("rope_type", "type") if key in given]
    if not names or names[0] != names[-1] or not isinstance(names[0], str):
        raise ValueError(f"rope_scaling={dict(fields)!r}: expected one 'rope_type', of {', '.join(ROPE_TYPES)}")
    name = names[0]
    check_choice("rope_scaling: rope_type", name, ROPE_TYPES)
    known = {field.name: field for field in dataclasses.fields(ROPE_TYPES[name])}
    for key in given:
        if key not in known:
            raise ValueError("rope_scaling: " + unknown_name(f"field of {name!r}:", key, known or ("rope_type",)))
    for key, field in known.items():
        if key not in given and field.default is dataclasses.MISSING:
            raise ValueError(f"rope_scaling={dict(fields)!r}: expected the field {key!r} of {name!r} too")
    return ROPE_TYPES[name](**{key: _checked(key, value) for key, value in given.items()})


def freeze_rope_scaling(fields: Mapping[str, Any] | None) -> FrozenDict | None:
    """The mapping as a frozen configuration keeps it (hashable). Raises: as `read_rope_scaling`."""
    read_rope_scaling(fields)
    if fields is None:
        return None
    return FrozenDict({key: tuple(value) if isinstance(value, list) else value for key, value in dict(fields).items()})


def _checked(key: str, value: Any) -> int | float | bool | tuple[float, ...]:
    argument = f"rope_scaling: {key}"
    if key in ("short_factor", "long_factor"):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{argument}={value!r}: expected a number for each pair of channels")
        for number in value:
            check_positive(**{argument: number})
        return tuple(float(number) for number in value)
    if key == "truncate":
        if not isinstance(value, bool):
            raise ValueError(f"{argument}={value!r}: expected True or False")
        return value
    if key == "original_max_position_embeddings":
        check_whole(**{argument: value})
        return value
    if key in ("mscale", "mscale_all_dim") and value == 0:
        return 0.0
    check_positive(**{argument: value})
    if key == "factor" and value < 1:
        raise ValueError(f"{argument}={value!r}: expected at least 1; positions are drawn together, never apart")
    return float(value)
