"""Hybrids: decoders whose layers are mixed, by name, as fields of a `ModelConfig`.

    lcr.make_model({"vocab_size": 256, "d_model": 64, **lcr.hybrid("jamba", num_layers=8)}, rngs=rngs)

Any other is a tuple of names: `mixers=("mamba", "mamba", "gqa")`.
"""

import inspect
from collections.abc import Callable
from typing import Any

from lcr.checks import check_whole, unknown_name
from lcr.layers.moe import MoEConfig


def jamba(num_layers: int, *, num_experts: int = 16, top_k: int = 2, d_expert: int | None = None) -> dict[str, Any]:
    """Jamba (arXiv 2403.19887): Mamba with norms inside, one layer in eight attention without positions, and a
    mixture of experts as every second feed-forward.

    Layer i is attention where i mod 8 = 4, and has experts where i is odd, as in the released models; the softmax
    over all experts weighs the top_k as it is. The depth need not be a multiple of 8, but must reach an attention
    layer; multiples of 8 are stacked.

    num_experts, top_k: of each mixture. d_expert: an expert's width; None: the other feed-forwards' width over top_k,
    so that all feed-forwards cost a token the same (in the released models an expert is as wide as those).

    Raises: ValueError for fewer than 5 layers.
    """
    if num_layers < 5:
        raise ValueError(
            f"num_layers={num_layers}: jamba's first attention layer is the fifth; expected at least 5, better 8 or a "
            "multiple of 8"
        )
    MoEConfig(num_experts=num_experts, top_k=top_k, d_expert=d_expert)  # raises where these do not fit together
    return {
        "mixers": tuple("gqa" if i % 8 == 4 else "mamba" for i in range(num_layers)),
        "mixer_options": {"gqa": {"positions": "none"}, "mamba": {"inner_norm": "scaled"}},
        "feed_forward": tuple("moe" if i % 2 == 1 else "swiglu" for i in range(num_layers)),
        "feed_forward_options": {
            "moe": {"num_experts": num_experts, "top_k": top_k, "d_expert": d_expert, "normalize": False}
        },
    }


def samba(num_layers: int, *, window: int = 2048) -> dict[str, Any]:
    """Samba (arXiv 2406.07522, section 2.1): Mamba and attention in a sliding window by turns, each with a SwiGLU.

    Attention has RoPE and a key-value head for each head. num_layers: a mixer with its feed-forward counts as one.

    Raises: ValueError for an odd number of layers.
    """
    check_whole(window=window)
    if num_layers % 2:
        raise ValueError(f"num_layers={num_layers}: samba's layers come in pairs; expected an even number")
    return {
        "mixers": ("mamba", "attention") * (num_layers // 2),
        "mixer_options": {"attention": {"window": window, "positions": "rope"}},
        "feed_forward": "swiglu",
    }


def griffin(num_layers: int, *, window: int = 1024) -> dict[str, Any]:
    """Griffin (arXiv 2402.19427, section 2): two recurrent blocks, then multi-query attention in a sliding window.

    Layer i is attention where i mod 3 = 2, and has RoPE. The depth need not be a multiple of 3, but must reach an
    attention layer; multiples of 3 are stacked. Each layer's feed-forward is a SwiGLU; the paper's gate is a GeLU.

    Raises: ValueError for fewer than 3 layers.
    """
    check_whole(window=window)
    if num_layers < 3:
        raise ValueError(
            f"num_layers={num_layers}: griffin's first attention layer is the third; expected at least 3, better a "
            "multiple of 3"
        )
    return {
        "mixers": tuple("mqa" if i % 3 == 2 else "rglru" for i in range(num_layers)),
        "mixer_options": {"mqa": {"window": window, "positions": "rope"}},
        "feed_forward": "swiglu",
    }


HYBRIDS: dict[str, Callable[..., dict[str, Any]]] = {
    "jamba": jamba,
    "samba": samba,
    "griffin": griffin,
}


def hybrid(name: str, num_layers: int, **options: Any) -> dict[str, Any]:
    """The layers of the hybrid `name`: fields of a `ModelConfig`, to be merged with its width and vocabulary.

    name: one of `HYBRIDS`. options: those of its function there.
    Raises: ValueError for an unknown name or option (naming the nearest), and for a depth the pattern does not fit.
    """
    if name not in HYBRIDS:
        raise ValueError(unknown_name("hybrid", name, HYBRIDS))
    check_whole(num_layers=num_layers)
    known = [option for option in inspect.signature(HYBRIDS[name]).parameters if option != "num_layers"]
    for option in options:
        if option not in known:
            raise ValueError(unknown_name(f"option of hybrid {name!r}:", option, known))
    return HYBRIDS[name](num_layers, **options)
