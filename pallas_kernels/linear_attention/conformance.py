"""What every implementation of `linear_attention` is held to: see `pallas_kernels.conformance`."""

import dataclasses

import numpy as np

from pallas_kernels import conformance
from pallas_kernels.linear_attention.api import linear_attention
from pallas_kernels.linear_attention.shapes import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """gates: "mild", of which some twenty leave nothing; "slow", of which hundreds leave something; or "extreme", any of -1e-6,
    -100, -1e4, -inf and 0 beside one another. fresh: no initial state."""

    shape: Shape
    packed: bool = False
    gates: str = "mild"
    fresh: bool = False


def _shape(T: int, H: int = 2, B: int = 1, K: int = 64, V: int = 64, decay: str = "token", **options) -> Shape:
    return Shape(B=B, T=T, H=H, K=K, V=V, decay=decay, **options)


# Whole chunks where their remainder is not what it is about: on a CPU that is a program of its own, and twice the time.
CASES = {
    "one token": Case(shape=_shape(1, B=3)),
    "one token, padded": Case(shape=_shape(1, B=3), packed=True),
    "one token, padded, head": Case(shape=_shape(1, B=3, decay="head"), packed=True),
    "one token, channel, bonus": Case(shape=_shape(1, B=2, decay="channel", bonus=True)),
    "one token, groups": Case(shape=_shape(1, H=4, G=2)),
    "one chunk": Case(shape=_shape(64), fresh=True),
    "ragged, head": Case(shape=_shape(63, B=2, V=128, decay="head")),
    "ragged": Case(shape=_shape(500, H=1, K=128), gates="slow"),
    "no decay": Case(shape=_shape(192, decay="none")),
    "packed": Case(shape=_shape(300, B=2), packed=True),
    "packed, head": Case(shape=_shape(256, B=2, H=1, decay="head"), packed=True),
    "groups": Case(shape=_shape(192, H=4, G=2, K=128)),
    "groups, packed": Case(shape=_shape(192, B=2, H=3, G=1), packed=True),
    "extreme gates": Case(shape=_shape(192), gates="extreme"),
    "token, bonus": Case(shape=_shape(192, B=2, bonus=True), packed=True),
    "wide": Case(shape=_shape(128, H=1, K=256, V=512, decay="head")),
    "channel": Case(shape=_shape(256, K=128, decay="channel"), gates="slow"),
    "channel, ragged": Case(shape=_shape(63, B=2, V=128, decay="channel")),
    "channel, packed": Case(shape=_shape(300, B=2, decay="channel"), packed=True),
    "channel, bonus": Case(shape=_shape(192, B=2, decay="channel", bonus=True), packed=True),
    "channel, extreme gates": Case(shape=_shape(192, decay="channel"), gates="extreme"),
    "channel, wide": Case(shape=_shape(128, H=1, K=256, V=256, decay="channel"), fresh=True),
    "small widths": Case(shape=_shape(100, K=16, V=24)),
    "small widths, channel": Case(shape=_shape(100, K=16, V=24, decay="channel")),
}


def inputs(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    shape, rng = case.shape, np.random.default_rng(0)
    B, T, H, K, V = shape[:5]
    keys = B, T, shape.G or H, K
    arrays = {"q": rng.standard_normal(keys), "k": rng.standard_normal(keys), "v": rng.standard_normal((B, T, H, V))}
    sizes = {"channel": (B, T, H, K), "token": (B, T, H), "head": (H,)}
    if shape.decay in sizes:
        size = sizes[shape.decay]
        arrays["log_decay"] = (-0.002 if case.gates == "slow" else -0.2) * np.exp(rng.standard_normal(size))
        if case.gates == "extreme":
            kinds = [-1e-6, -1e-3, -100.0, -1e4, -np.inf, 0.0]
            arrays["log_decay"] = rng.choice(kinds, size, p=[0.5, 0.3, 0.05, 0.05, 0.05, 0.05])
    if shape.bonus:
        arrays["bonus"] = rng.standard_normal((H, K))
    if not case.fresh:
        arrays["initial_state"] = rng.standard_normal((B, H, K, V))
    return arrays, conformance.documents(rng, B, T) if case.packed else None


def call(floats, segment_ids, implementation):
    return linear_attention(**floats, segment_ids=segment_ids, implementation=implementation)


SUITE = conformance.Suite(CASES, inputs, frozenset({"log_decay", "bonus", "initial_state"}), call)
