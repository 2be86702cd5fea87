"""A TPU's attention kernels under `jax.vmap`: one call with more rows of the batch.

Pallas would add an axis to the grid, which it cannot where arrays stay in main memory, as those of the kernels do.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def with_more_rows(kernel: Callable[[tuple, Any], Any]) -> Callable[[tuple, Any], Any]:
    """`kernel(arrays, slopes)`. Arrays and results have a first axis B; those of integers B or 1: all rows alike."""
    run = custom_vmap(kernel)

    @run.def_vmap
    def _(size, batched, arrays, slopes):
        if any(jax.tree.leaves(batched[1])):  # slopes belong to the heads of one call
            return _one_by_one(kernel, size, batched, arrays, slopes)
        rows = max(a.shape[mapped] for a, mapped in zip(*map(jax.tree.leaves, (arrays, batched[0])), strict=True))

        def merge(a, mapped):
            if not mapped and a.shape[0] == 1 and jnp.issubdtype(a.dtype, jnp.integer):
                return a
            a = a if mapped else a[None]
            a = jnp.broadcast_to(a, (size, rows, *a.shape[2:]))
            return a.reshape(size * rows, *a.shape[2:])

        results = run(jax.tree.map(merge, arrays, batched[0]), slopes)
        results = jax.tree.map(lambda a: a.reshape(size, rows, *a.shape[1:]), results)
        return results, jax.tree.map(lambda _: True, results)

    return run


def _one_by_one(kernel, size, batched, *arguments):
    spread = jax.tree.map(
        lambda a, mapped: a if mapped else jnp.broadcast_to(a[None], (size, *a.shape)), arguments, tuple(batched)
    )
    results = jax.lax.map(lambda one: kernel(*one), spread)
    return results, jax.tree.map(lambda _: True, results)
