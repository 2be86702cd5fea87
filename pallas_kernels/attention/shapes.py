"""The shapes of `attention` that tests, benchmarks, compile checks and tuning all use, named once."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """One call: sizes by their letters (S: None is T, V: None is K), and the options of the op.

    latent: whether values are the first V channels of the keys. documents: how many of equal length lie in a row.
    """

    B: int = 1
    T: int
    S: int | None = None
    H: int
    G: int
    K: int
    V: int | None = None
    causal: bool = True
    window: int | None = None
    soft_cap: float | None = None
    scale: float | None = None
    latent: bool = False
    documents: int = 1

    @property
    def q(self) -> tuple[int, int, int, int]:
        return self.B, self.T, self.H, self.K

    @property
    def k(self) -> tuple[int, int, int, int]:
        return self.B, self.S or self.T, self.G, self.K

    @property
    def v(self) -> tuple[int, int, int, int]:
        return self.B, self.S or self.T, self.G, self.V or self.K

    @property
    def options(self) -> dict:
        options = {"causal": self.causal, "window": self.window, "soft_cap": self.soft_cap, "scale": self.scale}
        return options | ({"value_width": self.V} if self.latent else {})

    @property
    def forward_flops(self) -> int:
        """Floating-point operations of both products over the scores that are seen (queries are the last keys)."""
        length, kv_length = self.T, self.S or self.T
        before = kv_length - length
        window = self.window or kv_length
        if self.causal:
            seen = sum(min(before + t + 1, window) for t in range(length))
        else:
            seen = sum(min(kv_length, kv_length - (before + t) - 1 + window) for t in range(length))
        return 2 * self.B * self.H * seen * (self.K + (self.V or self.K))


# Of the models and lengths that matter: benchmarks and compile checks.
REAL = {
    "mha 2k": Shape(T=2_048, H=8, G=8, K=64),
    "mha 4k": Shape(T=4_096, H=8, G=8, K=64),
    "mha 8k": Shape(T=8_192, H=8, G=8, K=64),
    "mha 16k": Shape(T=16_384, H=8, G=8, K=64),
    "mqa 8k": Shape(T=8_192, H=8, G=1, K=64),
    "llama3 8b 8k": Shape(T=8_192, H=32, G=8, K=128),
    "mistral 7b 32k": Shape(T=32_768, H=32, G=8, K=128, window=4_096),
    "gemma2 9b 8k": Shape(T=8_192, H=16, G=8, K=256, soft_cap=50.0),
    "deepseek v3 4k": Shape(T=4_096, H=128, G=128, K=192, V=128),
    "llama3 8b prefill 4k of 128k": Shape(T=4_096, S=131_072, H=32, G=8, K=128),
    "llama3 8b packed 8k": Shape(B=2, T=8_192, H=32, G=8, K=128, documents=4),
    "llama3 8b decode 128k": Shape(B=8, T=1, S=131_072, H=32, G=8, K=128),
    "deepseek v3 decode 32k": Shape(B=8, T=1, S=32_768, H=128, G=1, K=576, V=512, latent=True),
}
