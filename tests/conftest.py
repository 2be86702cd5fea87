"""Strict everywhere: annotations checked, no implicit promotion of dtypes or ranks, warnings are errors."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# How many threads XLA's CPU client has. JAX's GPU interpreter runs each warpgroup of a block on one, where it blocks at
# barriers: with two threads, on a machine of two cores, a kernel of three warpgroups waits forever.
os.environ.setdefault("NPROC", "16")
# NumPy's matrix products here are small: on a busy machine a second thread is waited for ten times as long as the
# product takes. Of effect in the workers, which are started after this.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# Where kernels are compiled for TPUs that are not there: by all workers at once, with no question to a cloud.
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")

import jax
import pytest
from jaxtyping import install_import_hook
from simulating import without_devices

without_devices()
jax.config.update("jax_disable_most_optimizations", True)  # see compiling.py
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook(["lcr", "pallas_kernels"], "beartype.beartype")


SLOWEST = ("test_killed.py", "test_notebooks.py")


def pytest_collection_modifyitems(items):
    """What takes longest by itself goes first, so that no worker waits for another's last test."""
    items.sort(key=lambda item: item.path.name not in SLOWEST)


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Every program compiled for a CPU holds memory maps, of which a process may have some 65,000: kept for the whole
    run, those of a thousand tests are too many, and the process dies."""
    yield
    jax.clear_caches()
