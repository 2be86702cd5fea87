"""What every implementation of a scan is held to: its results and gradients against the reference's, and a second run.

Each op has a module `conformance` with its CASES, and how a case becomes a call; the tests run them (a simulated device),
and `python -m pallas_kernels.check --run` (a real one). `attention` has a suite of its own.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.tolerances import error

Call = Callable[[dict[str, Array], Array | None, str], tuple[Array, Array]]
# Of a function and arguments: what runs it, as often as it is called. The tests have one that does not compile.
Program = Callable[..., Callable[[], Any]]
_jitted = functools.cache(jax.jit)


def compiled(function: Callable, *args: Any) -> Callable[[], Any]:
    return functools.partial(_jitted(function), *args)


@dataclasses.dataclass(frozen=True)
class Suite:
    """inputs: of a case, NumPy arrays by name, and its segment ids (or None). exact: the names of those that are never in
    half precision. call: the op on such inputs, by the implementation of that name: `(o, final state)`."""

    cases: Mapping[str, Any]
    inputs: Callable[[Any], tuple[dict[str, np.ndarray], np.ndarray | None]]
    exact: frozenset[str]
    call: Call

    def prepare(
        self, case: Any, implementation: str, dtype: Any, rounded: Any = None, program: Program = compiled
    ) -> Callable[[], dict[str, np.ndarray]]:
        """What computes o, the final state, and the gradient of every input, for random cotangents of both.

        rounded: a dtype to which the inputs are rounded before they get theirs. What stands in padding is NaN, in inputs
        and in the cotangent of o.
        """
        rounded = dtype if rounded is None else rounded
        inputs, ids = self.inputs(case)
        if ids is not None:
            for name in inputs.keys() - {"initial_state"}:
                if inputs[name].shape[:2] == ids.shape:
                    inputs[name][ids == 0] = np.nan
        floats = {
            name: jnp.asarray(a, jnp.float32) if name in self.exact else jnp.asarray(a, rounded).astype(dtype)
            for name, a in inputs.items()
        }
        ids = None if ids is None else jnp.asarray(ids, jnp.int32)
        run = program(_both(self.call, implementation), floats, ids)

        def compute():
            (o, state), gradients = run()
            assert (o.dtype, state.dtype) == (jnp.dtype(dtype), jnp.float32), f"o {o.dtype}, state {state.dtype}"
            for name, gradient in gradients.items():
                assert gradient.dtype == floats[name].dtype, f"d{name}: {gradient.dtype} for {floats[name].dtype}"
            results = {"o": o, "state": state, **{f"d{name}": a for name, a in gradients.items()}}
            return {name: np.asarray(a.astype(jnp.float32)) for name, a in results.items()}

        return compute

    def errors(
        self,
        case: Any,
        implementation: str,
        dtype: Any,
        poison: Callable[[], None] = lambda: None,
        twice: bool = True,
        program: Program = compiled,
        reference: Program = compiled,
    ) -> Iterator[tuple[str, float, str]]:
        """Of every result its name, its error, and the kind of tolerance that it has to be within.

        poison: is called before each run, to fill memory with NaN. twice: whether the results of a second run have to be
        the same bits. program, reference: how the implementation and the reference are run.
        """
        kind = "bfloat16" if np.dtype(dtype).itemsize < 4 else "float32"
        want = self.prepare(case, "reference", jnp.float32, rounded=dtype, program=reference)()
        run = self.prepare(case, implementation, dtype, program=program)
        poison()
        found = run()
        poison()
        again = run() if twice else found
        for name, expected in want.items():
            yield name, error(found[name], expected), kind + " gradient" * name.startswith("d")
            if twice:
                yield f"{name}, second run", float((found[name] != again[name]).any()), "exact"


@functools.cache
def _both(call: Call, implementation: str):
    def both(floats, ids):
        results, pullback = jax.vjp(lambda floats: call(floats, ids, implementation), floats)
        rng = np.random.default_rng(1)
        cotangents = [jnp.asarray(rng.standard_normal(a.shape), jnp.float32).astype(a.dtype) for a in results]
        if ids is not None:
            padding = (ids == 0).reshape(ids.shape + (1,) * (cotangents[0].ndim - 2))
            cotangents[0] = jnp.where(padding, jnp.asarray(jnp.nan, cotangents[0].dtype), cotangents[0])
        return results, pullback(tuple(cotangents))[0]

    return both


def documents(rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    """Segment ids: documents of all lengths, padding at both ends and inside, a boundary at token 64, an id that comes
    back; in the last row 64 tokens of padding, and a document that goes on after them."""
    ids = np.sort(rng.integers(1, 5, (batch, length)), axis=1)
    ids[:, 64:] += 5
    ids[:, -length // 8 :] = 1
    ids[0, : length // 6] = 0
    ids[-1, -length // 10 :] = 0
    ids[-1, 64:128] = 0
    ids[-1, 128 : 128 + length // 4] = ids[-1, 63:64]
    ids[rng.random(ids.shape) < 0.03] = 0
    return ids.astype(np.int32)
