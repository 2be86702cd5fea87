"""The real shapes of linear attention, named once: tests and compile checks use these."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes by letter (G, heads of keys and queries: None is H).

    `decay` is "channel" (`[B, T, H, K]`), "token" (`[B, T, H]`), "head" (`[H]`) or "none".
    """

    B: int
    T: int
    H: int
    K: int
    V: int
    decay: str = "token"
    bonus: bool = False
    G: int | None = None


SHAPES = {
    # a few heads on a CPU; more rows; more heads
    "few_heads": Shape(B=1, T=4096, H=4, K=64, V=64),
    "many_rows": Shape(B=8, T=4096, H=4, K=64, V=64),
    "many_heads": Shape(B=1, T=4096, H=16, K=64, V=64),
    # RetNet: the default of `lcr.mixers.retnet` at width 256, a small model in training, and 1.3B of the paper
    "retnet": Shape(B=1, T=4096, H=4, K=64, V=128, decay="head"),
    "retnet_small": Shape(B=16, T=640, H=4, K=16, V=32, decay="head"),
    "retnet_1b": Shape(B=4, T=2048, H=8, K=256, V=512, decay="head"),
    # gated linear attention: a small one as the others above, and 1.3B of the paper
    "gla": Shape(B=1, T=4096, H=4, K=64, V=64, decay="channel"),
    "gla_rows": Shape(B=8, T=4096, H=4, K=64, V=64, decay="channel"),
    "gla_1b": Shape(B=4, T=2048, H=4, K=256, V=512, decay="channel"),
    # RWKV-6: heads of 64 at every size; the small one of these, and 1.6B
    "rwkv6": Shape(B=1, T=4096, H=4, K=64, V=64, decay="channel", bonus=True),
    "rwkv6_1b": Shape(B=4, T=2048, H=32, K=64, V=64, decay="channel", bonus=True),
    # Mamba-2 1.3B: 64 heads of 64 share one group of keys and queries, 128 wide (its state); and a token of it
    "mamba2_1b": Shape(B=4, T=2048, H=64, G=1, K=128, V=64),
    "mamba2_1b_decode": Shape(B=32, T=1, H=64, G=1, K=128, V=64),
    # decoding, and lengths that no chunk divides
    "decode": Shape(B=8, T=1, H=4, K=64, V=128, decay="head"),
    "ragged_short": Shape(B=2, T=63, H=2, K=16, V=24),
    "ragged": Shape(B=1, T=500, H=2, K=16, V=8),
}

# Of the models that matter: compile checks.
REAL = {name: SHAPES[name] for name in ("retnet_1b", "gla_1b", "rwkv6_1b", "mamba2_1b", "mamba2_1b_decode")}
