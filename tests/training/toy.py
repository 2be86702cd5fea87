"""A model with the decoder's face that compiles in a moment, and small configurations for it."""

import contextlib

import jax
import jax.numpy as jnp
import lcr
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache
from lcr.training.config import default_config


class Toy(nnx.Module):
    """Logits from a token and the one before it."""

    def __init__(self, config, *, rngs):
        d_model = config["d_model"]
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (config["vocab_size"], d_model)))
        self.mix = nnx.Linear(d_model, d_model, rngs=rngs)
        self.log_decay = nnx.Param(jnp.zeros(d_model), group="no_decay")

    def __call__(self, tokens, states=None, segment_ids=None, *, logits_at=None):
        x = self.embedding[...][tokens]
        before = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :-1]
        x = x + self.mix(before) * jnp.exp(self.log_decay[...])[None, None]
        if logits_at is not None:
            x = jnp.take_along_axis(x, logits_at[..., None], axis=1)
        return jnp.einsum("btd,vd->btv", x, self.embedding[...]), states


def toy_config(**values):
    """A run of a few steps; values by dotted key: `toy_config(**{"training.steps": 4})`."""
    config = default_config()
    config.model.d_model = 8
    config.data.lengths = (96, 100)
    config.data.batch_tokens = 400
    config.optimizer.warmup_steps = 2
    config.training.steps = 12
    config.training.log_every = 2
    config.training.checkpoint_every = 5
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


def make_toy(config, *, rngs):
    return Toy(config, rngs=rngs)


@contextlib.contextmanager
def toy_models():
    """Runs train `Toy` instead of a decoder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lcr, "make_model", make_toy)
        yield


CACHE_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}


@contextlib.contextmanager
def compiled_programs_kept_in(directory):
    """One program compiled once, however many runs need it."""
    settings = {"jax_compilation_cache_dir": str(directory), **CACHE_SETTINGS}
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
