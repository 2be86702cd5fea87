"""The real shapes of the delta rule, named once: tests and compile checks use these."""

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes by letter; `decay` is "none", "scalar" (`log_decay [B, T, H]`) or "vector" (`[B, T, H, K]`)."""

    B: int
    T: int
    H: int
    K: int
    V: int
    decay: str = "scalar"


SHAPES = {
    # a few heads on a CPU, and more rows: DeltaNet, Gated DeltaNet, RWKV-7 or KDA
    "few_heads_none": Shape(B=1, T=4096, H=4, K=64, V=64, decay="none"),
    "few_heads": Shape(B=1, T=4096, H=4, K=64, V=64),
    "few_heads_vector": Shape(B=1, T=4096, H=4, K=64, V=64, decay="vector"),
    "many_rows": Shape(B=8, T=4096, H=4, K=64, V=64),
    "many_rows_vector": Shape(B=8, T=4096, H=4, K=64, V=64, decay="vector"),
    "many_heads": Shape(B=1, T=4096, H=16, K=64, V=64),
    "many_heads_vector": Shape(B=1, T=4096, H=16, K=64, V=64, decay="vector"),
    # a small model in training
    "small": Shape(B=16, T=640, H=4, K=16, V=16),
    "small_vector": Shape(B=16, T=640, H=4, K=16, V=16, decay="vector"),
    # 1.3B models of the papers: DeltaNet, Gated DeltaNet, RWKV-7 (1.5B); and a token of the last
    "deltanet_1b": Shape(B=4, T=2048, H=16, K=128, V=128, decay="none"),
    "gated_deltanet_1b": Shape(B=4, T=2048, H=6, K=256, V=512),
    "rwkv7_1b": Shape(B=4, T=2048, H=32, K=64, V=64, decay="vector"),
    "rwkv7_1b_decode": Shape(B=32, T=1, H=32, K=64, V=64, decay="vector"),
    # decoding, and lengths that no chunk divides
    "decode": Shape(B=8, T=1, H=4, K=64, V=64, decay="vector"),
    "ragged_short": Shape(B=2, T=63, H=2, K=16, V=24, decay="vector"),
    "ragged": Shape(B=1, T=500, H=2, K=16, V=8),
}

# Of the models that matter: compile checks.
REAL = {name: SHAPES[name] for name in ("deltanet_1b", "gated_deltanet_1b", "rwkv7_1b", "rwkv7_1b_decode")}
