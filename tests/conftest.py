"""Strict everywhere: annotations checked, no implicit promotion of dtypes or ranks, warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_disable_most_optimizations", True)  # see compiling.py
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(["lcr", "pallas_kernels"], "beartype.beartype")
