"""What every implementation of `delta_rule` is held to: see `pallas_kernels.conformance`."""

import dataclasses

import numpy as np

from pallas_kernels import conformance
from pallas_kernels.delta_rule.api import delta_rule
from pallas_kernels.delta_rule.shapes import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """keys: "random"; or "alike", in which all keys of a document are nearly one and the learning rate is nearly 2, where
    the triangular system is at its worst. gates: "mild", "slow"; or "extreme", any of -1e-6, -100, -1e4, -inf and 0 beside one
    another. fresh: no initial state."""

    shape: Shape
    packed: bool = False
    keys: str = "random"
    gates: str = "mild"
    fresh: bool = False


def _shape(T: int, H: int = 2, B: int = 1, K: int = 64, V: int = 64, decay: str = "scalar") -> Shape:
    return Shape(B=B, T=T, H=H, K=K, V=V, decay=decay)


# Whole chunks where their remainder is not what it is about: on a CPU that is a program of its own, and twice the time.
CASES = {
    "one token": Case(shape=_shape(1, B=3)),
    "one token, padded": Case(shape=_shape(1, B=3, decay="vector"), packed=True),
    "one chunk": Case(shape=_shape(64), fresh=True),
    "ragged, no decay": Case(shape=_shape(63, B=2, V=128, decay="none")),
    "ragged": Case(shape=_shape(500, H=1, K=128, V=128), gates="slow"),
    "packed": Case(shape=_shape(256, B=2), packed=True),
    "packed, no decay": Case(shape=_shape(192, B=2, H=1, decay="none"), packed=True),
    "keys alike": Case(shape=_shape(192, H=1, decay="none"), keys="alike"),
    "extreme gates": Case(shape=_shape(192), gates="extreme"),
    "wide": Case(shape=_shape(128, H=1, K=256, V=512)),
    "vector": Case(shape=_shape(192, decay="vector"), gates="slow"),
    "vector, ragged": Case(shape=_shape(63, B=2, V=128, decay="vector")),
    "vector, packed": Case(shape=_shape(300, B=2, decay="vector"), packed=True),
    "vector, extreme gates": Case(shape=_shape(192, decay="vector"), gates="extreme"),
    "vector, wide": Case(shape=_shape(64, H=1, K=128, V=128, decay="vector")),
    "small widths": Case(shape=_shape(100, K=16, V=24, decay="vector")),
}


def inputs(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """a and b as in DeltaNet, with a little of their own."""
    shape, rng = case.shape, np.random.default_rng(0)
    B, T, H, K, V, decay = shape
    key = rng.standard_normal((B, T, H, K))
    if case.keys == "alike":
        key = key[:, :1] + 0.1 * key
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    rate = 1.95 if case.keys == "alike" else 2 / (1 + np.exp(rng.standard_normal((B, T, H, 1))))
    own = 0.0 if case.keys == "alike" else 0.05
    arrays = {
        "q": rng.standard_normal((B, T, H, K)),
        "k": rng.standard_normal((B, T, H, K)),
        "v": rng.standard_normal((B, T, H, V)),
        "a": key + own * rng.standard_normal((B, T, H, K)),
        "b": -rate * key,
    }
    sizes = {"scalar": (B, T, H), "vector": (B, T, H, K)}
    if decay in sizes:
        arrays["log_decay"] = (-0.002 if case.gates == "slow" else -0.2) * np.abs(rng.standard_normal(sizes[decay]))
        if case.gates == "extreme":
            kinds = [-1e-6, -1e-3, -100.0, -1e4, -np.inf, 0.0]
            arrays["log_decay"] = rng.choice(kinds, sizes[decay], p=[0.5, 0.3, 0.05, 0.05, 0.05, 0.05])
    if not case.fresh:
        arrays["initial_state"] = rng.standard_normal((B, H, K, V))
    return arrays, conformance.documents(rng, B, T) if case.packed else None


def call(floats, segment_ids, implementation):
    return delta_rule(**floats, segment_ids=segment_ids, implementation=implementation)


SUITE = conformance.Suite(CASES, inputs, frozenset({"log_decay", "initial_state"}), call)
