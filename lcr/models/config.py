"""What a decoder is made of."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax.core import FrozenDict
from ml_collections import ConfigDict

from lcr.checks import check_choice, check_flags, check_positive, check_whole, unknown_name
from lcr.layers.feed_forward import FEED_FORWARDS, feed_forward_config
from lcr.layers.mlp import default_d_ff
from lcr.layers.norms import NORMS
from lcr.mixers import mixer_config

DTYPES = ("float32", "bfloat16")
REMAT = ("none", "full", "dots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder: its mixers, in order, and its sizes.

    mixers:         names of `lcr.MIXERS`; a hybrid is a mixed tuple; the depth is its length. Layers of one mixer may
                    differ in their options: what follows a colon, as in "gqa:local", is a name of their own.
    mixer_options:  {mixer name: {option: value}}, the name with its colon and what follows.
    d_ff:           width of the feed-forward after each mixer: None for its default (8/3 d_model of a SwiGLU, 4 d_model
                    of channel mixing), 0 for no feed-forward.
    feed_forward:   "swiglu", "moe" (mixture of experts), "channel_mixing" (RWKV's) or "none"; one name for all layers,
                    or a tuple with one for each.
    feed_forward_options: {feed-forward's name: {option: value}}.
    tie_embeddings: whether the output projection is the transposed embedding.
    embedding_scale: what embeddings are multiplied by (Gemma: sqrt(d_model)), rounded to the compute dtype.
    embedding_norm: whether they are normed (RWKV).
    norm:           "rms"; "rms_offset", its scale learned as the difference from 1 (Gemma); "layer" (LayerNorm); or
                    "layer_without_bias". norm_epsilon: of these. final_norm_epsilon: of the last one, before the
                    output, where it differs (RWKV-4 in transformers).
    post_norms:     whether what comes out of a mixer and a feed-forward is normed too, before it is added (Gemma 2).
    logit_soft_cap: logits become logit_soft_cap tanh(logit / logit_soft_cap).
    dtype:          of the compute, "float32" or "bfloat16"; parameters are float32, logits are float32.
    remat:          what the backward pass computes again: "none" (save everything), "dots" (save the results of
                    matrix products), "full" (save each repeating group's input only).
    """

    vocab_size: int
    d_model: int
    mixers: Sequence[str]
    mixer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    d_ff: int | None = None
    feed_forward: str | Sequence[str] = "swiglu"
    feed_forward_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    norm: str = "rms"
    post_norms: bool = False
    logit_soft_cap: float | None = None
    dtype: str = "float32"
    remat: str = "none"
    norm_epsilon: float = 1e-5
    final_norm_epsilon: float | None = None

    def __post_init__(self):
        check_whole(vocab_size=self.vocab_size, d_model=self.d_model)
        check_positive(norm_epsilon=self.norm_epsilon, embedding_scale=self.embedding_scale)
        if self.final_norm_epsilon is not None:
            check_positive(final_norm_epsilon=self.final_norm_epsilon)
        if self.logit_soft_cap is not None:
            check_positive(logit_soft_cap=self.logit_soft_cap)
        for name in ("tie_embeddings", "embedding_norm", "post_norms"):
            check_flags(**{name: getattr(self, name)})
        check_choice("norm", self.norm, NORMS)
        check_names("mixers", self.mixers)
        if not isinstance(self.feed_forward, str):
            check_names("feed_forward", self.feed_forward)
        object.__setattr__(self, "mixers", tuple(self.mixers))
        for field in ("mixer_options", "feed_forward_options"):
            options = getattr(self, field)
            if not isinstance(options, Mapping):
                raise ValueError(f"{field}={options!r}: expected a mapping, {{name: {{option: value}}}}")
            for name, chosen in options.items():
                if not isinstance(chosen, Mapping):
                    raise ValueError(f"{field}: {name}={chosen!r}: expected its options, such as {{'{name}': {{}}}}")
            # hashable, as a part of a jitted module is
            object.__setattr__(self, field, FrozenDict({name: dict(chosen) for name, chosen in options.items()}))
        if not self.mixers:
            raise ValueError("mixers=(): expected at least one mixer's name")
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("remat", self.remat, REMAT)
        if self.d_ff is not None and self.d_ff != 0:
            check_whole(d_ff=self.d_ff)
        chosen = {self.feed_forward} if isinstance(self.feed_forward, str) else set(self.feed_forward)
        if self.d_ff == 0 and chosen - {"swiglu", "none"}:
            raise ValueError(
                f"d_ff=0, no feed-forward, beside feed_forward={self.feed_forward!r}: expected one or the other"
            )
        for name in self.mixer_options:
            if name not in self.mixers:
                raise ValueError("mixer_options: " + unknown_name("mixer of this model", name, set(self.mixers)))
        for name in self.mixers:
            self.mixer(name)
        self._check_feed_forwards()

    def _check_feed_forwards(self):
        if not isinstance(self.feed_forward, str):
            object.__setattr__(self, "feed_forward", tuple(self.feed_forward))
            if len(self.feed_forward) != len(self.mixers):
                raise ValueError(
                    f"feed_forward={self.feed_forward!r}: expected one name, or one for each of the {len(self.mixers)} "
                    "mixers"
                )
        names = {name for _, name in self.layers}
        for name in names:
            check_choice("feed_forward", name, FEED_FORWARDS)
            feed_forward_config(name, **self.feed_forward_options.get(name, {}))
        for name in self.feed_forward_options:
            if name not in names:
                raise ValueError("feed_forward_options: " + unknown_name("feed-forward of this model", name, names))

    @property
    def layers(self) -> tuple[tuple[str, str], ...]:
        """(mixer, feed-forward) of each layer."""
        one = isinstance(self.feed_forward, str)
        names = (self.feed_forward,) * len(self.mixers) if one else self.feed_forward
        return tuple(zip(self.mixers, ("none",) * len(names) if self.ff_width == 0 else names, strict=True))

    @property
    def ff_width(self) -> int:
        return default_d_ff(self.d_model) if self.d_ff is None else self.d_ff

    @property
    def pattern(self) -> tuple[tuple[str, str], ...]:
        """The shortest tuple that, repeated, gives `layers`: the group of layers that is stacked and scanned."""
        layers, depth = self.layers, len(self.mixers)
        for period in range(1, depth + 1):
            if depth % period == 0 and layers == layers[:period] * (depth // period):
                return layers[:period]
        raise AssertionError("a tuple is its own repetition")

    def mixer(self, name: str):
        """The configuration of one mixer, in this model's compute dtype unless its options say otherwise."""
        options = {"dtype": jnp.dtype(self.dtype), **self.mixer_options.get(name, {})}
        return mixer_config(name.partition(":")[0], **options)

    def make_norm(self, epsilon: float | None = None):
        """A norm over the model's width. epsilon: None for that of most."""
        return NORMS[self.norm](self.d_model, epsilon=self.norm_epsilon if epsilon is None else epsilon)


def check_names(argument: str, names: object) -> None:
    """Raises: ValueError for what is no sequence of strings, a string alone included."""
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        likely = f"({names!r},)" if isinstance(names, str) else "('gqa', 'gqa')"
        raise ValueError(f"{argument}={names!r}: expected a tuple of names, like {likely}")


def model_config(config: "ModelConfig | Mapping[str, Any] | ConfigDict") -> ModelConfig:
    """A `ModelConfig` from one, or from a mapping (a `dict`, an `ml_collections.ConfigDict`) of its fields.

    Raises: ValueError for an unknown field, naming the nearest.
    """
    if isinstance(config, ModelConfig):
        return config
    # a ConfigDict's inner mappings are no `Mapping`s
    fields = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    known = [field.name for field in dataclasses.fields(ModelConfig)]
    for key in fields:
        if key not in known:
            raise ValueError(unknown_name("model option", key, known))
    return ModelConfig(**fields)
