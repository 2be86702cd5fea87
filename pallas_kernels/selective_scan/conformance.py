"""What every implementation of `selective_scan` is held to: see `pallas_kernels.conformance`."""

import dataclasses

import numpy as np

from pallas_kernels import conformance
from pallas_kernels.selective_scan.api import selective_scan
from pallas_kernels.selective_scan.shapes import Shape


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """steps: what softplus is taken of to give dt, the mean of it; "all" is every size beside every other. fresh: neither
    an initial state nor a skip."""

    shape: Shape
    packed: bool = False
    steps: float | str = -1.0
    fresh: bool = False


CASES = {
    "one token": Case(shape=Shape(B=3, T=1, D=128)),
    "one token, padded": Case(shape=Shape(B=3, T=1, D=200, gated=True), packed=True),
    "one chunk": Case(shape=Shape(B=1, T=64, D=128, gated=True), fresh=True),
    "ragged": Case(shape=Shape(B=2, T=63, D=200)),
    "long": Case(shape=Shape(B=1, T=500, D=128)),
    "packed": Case(shape=Shape(B=2, T=300, D=128, gated=True), packed=True),
    "steps of all sizes": Case(shape=Shape(B=1, T=200, D=128), steps="all"),
    "hardly any decay": Case(shape=Shape(B=1, T=200, D=128), steps=-16.0),
    "8 states": Case(shape=Shape(B=1, T=100, D=128, N=8)),
    "128 states": Case(shape=Shape(B=1, T=70, D=128, N=128, gated=True), packed=True),
    "small widths": Case(shape=Shape(B=2, T=70, D=24, N=5), packed=True),
    "gate": Case(shape=Shape(B=2, T=63, D=200, gated=True)),
}


def inputs(case: Case) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    rng = np.random.default_rng(0)
    B, T, D, N = case.shape[:4]
    mean = rng.choice([-20.0, -4.0, 0.0, 8.0], (B, T, D)) if case.steps == "all" else case.steps
    arrays = {
        "x": rng.standard_normal((B, T, D)),
        "dt": np.logaddexp(rng.standard_normal((B, T, D)) + mean, 0),
        "A": -np.exp(rng.standard_normal((D, N))),
        "B": rng.standard_normal((B, T, N)),
        "C": rng.standard_normal((B, T, N)),
    }
    if not case.fresh:
        arrays |= {"D": rng.standard_normal(D), "initial_state": rng.standard_normal((B, D, N))}
    if case.shape.gated:  # but for bfloat16, which would see nothing else beside large ones, also 0 and closed for good
        arrays["gate"] = rng.choice([0.0, 1.0, 1.0, 3.0, -100.0], (B, T, D)) * np.abs(rng.standard_normal((B, T, D)))
    return arrays, conformance.documents(rng, B, T) if case.packed else None


def call(floats, segment_ids, implementation):
    return selective_scan(**floats, segment_ids=segment_ids, implementation=implementation)


SUITE = conformance.Suite(CASES, inputs, frozenset({"dt", "A", "D", "initial_state"}), call)
