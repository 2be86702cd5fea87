"""The fields of a config.json, each checked as it is read."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from lcr.checks import is_number, unknown_name

logger = logging.getLogger("lcr.pretrained")

REQUIRED = object()
MOST = 2**31 - 1  # no size is larger; beyond it, shapes would overflow before they could be held against the tensors'
# Fields that say nothing of what a model computes from its tokens in evaluation.
SILENT = {
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
    "_name_or_path", "auto_map", "attention_dropout", "attn_implementation", "_attn_implementation", "hidden_dropout",
    "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp", "max_position_embeddings", "return_dict",
    "output_attentions", "output_hidden_states", "torchscript", "is_decoder", "tokenizer_class", "vocab_file",
    "chunk_size_feed_forward", "id2label", "label2id", "problem_type", "unk_token_id", "name_or_path",
    "is_encoder_decoder", "output_router_logits", "router_jitter_noise", "qk_head_dim", "use_return_dict",
    "model_max_length", "cache_implementation", "_attn_implementation_autoset",
}  # fmt: skip


class Fields:
    """Reads a mapping; every method raises a ValueError that names the field, its value and what was expected.

    A field that is missing has the default; `null` is the default too, unless that is None or the method says.
    """

    def __init__(self, fields: Mapping[str, Any], where: str = "config.json", tensors: int | None = None):
        """tensors: how many the checkpoint has, so that it cannot have more layers, or experts; None: not known."""
        self.fields, self.where, self.tensors = dict(fields), where, tensors
        self.read: set[str] = set()

    def get(self, name: str, default: Any = REQUIRED) -> Any:
        """The value as it stands there; the default where it is missing or null."""
        self.read.add(name)
        value = self.fields.get(name)
        if value is None:
            if default is REQUIRED:
                raise ValueError(f"{self.where}: the field {name!r} is missing")
            return default
        if isinstance(value, dict) and value.keys() == {"__float__"}:  # how infinities are written
            return float(value["__float__"])
        return value

    def whole(self, name: str, default: Any = REQUIRED, *, least: int = 1) -> Any:
        value = self.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.refuse(name, f"a whole number of at least {least}")
        if value > MOST:
            self.refuse(name, f"a whole number of at most {MOST:,}")
        return value

    def count(self, name: str, default: Any = REQUIRED) -> Any:
        """A whole number of layers or experts, of which each has a tensor of its own."""
        value = self.whole(name, default)
        if self.tensors is not None and self.get(name, None) is not None and value > self.tensors:
            self.refuse(name, f"at most the {self.tensors} tensors that there are")
        return value

    def null(self, name: str) -> bool:
        """Whether the field is there, and null."""
        return name in self.fields and self.get(name, None) is None

    def nullable(self, name: str, default: int | None) -> int | None:
        """A whole number, or None where the field is there and null."""
        return None if self.null(name) else self.whole(name, default)

    def number(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default)
        if value is default:
            return value
        if not is_number(value):
            self.refuse(name, "a number")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> Any:
        value = self.get(name, default)
        if value is not default and not isinstance(value, bool):
            self.refuse(name, "true or false")
        return value

    def choice(self, name: str, known: Mapping[Any, Any], default: Any = REQUIRED) -> Any:
        """What `known` has for the field's value. default: one of the keys of `known`."""
        value = self.get(name, default)
        try:
            return known[value]
        except (KeyError, TypeError):
            raise ValueError(
                f"{self.where}: {name}={value!r} is not supported; supported: {', '.join(map(str, known))}"
            ) from None

    def only(self, name: str, *values: Any) -> None:
        """Refuses a field that is there with a value other than these, or null."""
        if self.get(name, values[0]) not in values:
            self.refuse(name, " or ".join(map(repr, values)) + " (nothing else is supported)")

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; {} where it is missing or null."""
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            self.refuse(name, "an object")
        return dict(value)

    def names(self, name: str, known: Mapping[str, str], default: list[str]) -> tuple[str, ...]:
        """A list of the keys of `known`, as what `known` has for them."""
        value = self.get(name, default)
        if not isinstance(value, list):
            self.refuse(name, "a list")
        for one in value:
            if not isinstance(one, str) or one not in known:
                raise ValueError(f"{self.where}: {name}: " + unknown_name("value", one, known))
        return tuple(known[one] for one in value)

    def refuse(self, name: str, expected: str):
        raise ValueError(f"{self.where}: {name}={self.fields.get(name)!r}; expected {expected}")

    def done(self) -> None:
        """Says which fields nothing was made of."""
        self.unread(sorted(self.fields.keys() - self.read - SILENT))

    def unread(self, names: Iterable[str]) -> None:
        if listed := ", ".join(names):
            logger.warning("%s: no use was made of %s", self.where, listed)
