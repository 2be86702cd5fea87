"""The named hybrids: their layouts, that they run, and what they refuse."""

import jax
import jax.numpy as jnp
import lcr
import pytest
from flax import nnx
from lcr.models import HYBRIDS


def test_layouts():
    jamba = lcr.hybrid("jamba", num_layers=16)
    assert [i for i, mixer in enumerate(jamba["mixers"]) if mixer == "gqa"] == [4, 12]
    assert [i for i, mlp in enumerate(jamba["feed_forward"]) if mlp == "moe"] == [1, 3, 5, 7, 9, 11, 13, 15]
    assert set(jamba["mixers"]) == {"gqa", "mamba"} and set(jamba["feed_forward"]) == {"moe", "swiglu"}
    config = lcr.ModelConfig(vocab_size=9, d_model=16, **jamba)
    assert len(config.pattern) == 8, "sixteen layers are two stacked groups"
    assert config.mixer("gqa").positions == "none" and config.mixer("mamba").inner_norm == "scaled"
    assert dict(config.feed_forward_options["moe"])["num_experts"] == 16

    samba = lcr.ModelConfig(vocab_size=9, d_model=16, **lcr.hybrid("samba", num_layers=6))
    assert samba.mixers == ("mamba", "attention") * 3 and len(samba.pattern) == 2
    assert (samba.mixer("attention").window, samba.mixer("attention").positions) == (2048, "rope")

    griffin = lcr.ModelConfig(vocab_size=9, d_model=16, **lcr.hybrid("griffin", num_layers=8))
    assert griffin.mixers == ("rglru", "rglru", "mqa") * 2 + ("rglru", "rglru")
    assert griffin.mixer("mqa").window == 1024


@pytest.mark.parametrize("name", HYBRIDS)
def test_a_model_of_it_goes_from_states_to_states(name):
    model = lcr.make_model({"vocab_size": 31, "d_model": 16, **lcr.hybrid(name, 8)}, rngs=nnx.Rngs(0))
    states = model.init_states(2, 8)
    tokens = jnp.ones((2, 3), jnp.int32)
    logits, after = jax.eval_shape(model, tokens, states)
    assert logits.shape == (2, 3, 31)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (states, after)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("jmba", {"num_layers": 8}, "unknown hybrid 'jmba'. Did you mean 'jamba'"),
        ("jamba", {"num_layers": 0}, "num_layers=0: expected a whole number above 0"),
        ("jamba", {"num_layers": 4}, "num_layers=4: jamba's first attention layer is the fifth"),
        ("jamba", {"num_layers": 8, "num_expert": 4}, "unknown option of hybrid 'jamba'.*Did you mean 'num_experts'"),
        ("jamba", {"num_layers": 8, "num_experts": 1}, "top_k=2: expected at most num_experts=1"),
        ("samba", {"num_layers": 5}, "num_layers=5: samba's layers come in pairs"),
        ("griffin", {"num_layers": 2}, "num_layers=2: griffin's first attention layer is the third"),
        ("samba", {"num_layers": 4, "window": -1}, "window=-1: expected a whole number above 0"),
    ],
)
def test_errors_name_what_is_wrong(name, options, message):
    with pytest.raises(ValueError, match=message):
        lcr.hybrid(name, **options)
