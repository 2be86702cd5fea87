import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from flax import nnx
from lcr.layers.step_sizes import decay_rates


def test_rates_are_exponentials_and_stay_finite():
    np.testing.assert_allclose(decay_rates(jnp.array([-3.0, 0.0, 19.0])), np.exp([-3.0, 0.0, 19.0]), rtol=1e-6)
    assert np.isfinite(decay_rates(jnp.array([100.0, 1e4]))).all()


@pytest.mark.parametrize("name", ["mamba", "mamba2", "gated_deltanet"])
def test_a_rate_that_would_overflow_makes_nothing_but_forgetting(name):
    mixer = lcr.make_mixer(name, 16, rngs=nnx.Rngs(0))
    mixer.A_log[...] = jnp.full_like(mixer.A_log[...], 95.0)
    graph, parameters = nnx.split(mixer)
    ids = jnp.array([[1, 1, 0, 1, 2, 2]], jnp.int32)

    @jax.jit
    def run(parameters, x):
        return jax.value_and_grad(lambda p: (nnx.merge(graph, p)(x, None, ids)[0] ** 2).sum())(parameters)

    loss, gradients = run(parameters, jax.random.normal(jax.random.key(0), (1, 6, 16)))
    assert np.isfinite(loss) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
