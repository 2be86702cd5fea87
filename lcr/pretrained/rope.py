"""The fields of a config.json that say how queries and keys are rotated, and our options for them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lcr.checks import is_number
from lcr.layers.rope_scaling import ROPE_TYPES, freeze_rope_scaling
from lcr.pretrained.fields import Fields

NEEDS_LENGTH = ("dynamic", "yarn", "llama3", "longrope")


def read_rope(c: Fields, head_dim: int, *, longest: int, theta: float = 10_000.0) -> dict[str, Any]:
    """`rope_base` and `rope_scaling`, of `rope_parameters` (transformers from version 5 on), or of `rope_theta` and
    `rope_scaling` (before).

    longest, theta: the family's defaults of `max_position_embeddings` and of the base.
    """
    given = c.mapping("rope_scaling") or c.mapping("rope_parameters")
    base, partial = c.number("rope_theta", theta), c.number("partial_rotary_factor", 1.0)
    options = rope_options(c, given, head_dim, base=base, partial=partial, longest=longest)
    if "rope_width" in options:  # transformers has it in Phi-3 alone, of the families here
        raise ValueError(f"{c.where}: partial_rotary_factor is not supported in this family; expected 1, or none")
    return options


def rope_options(
    c: Fields,
    given: Mapping[str, Any],
    head_dim: int,
    *,
    base: float,
    longest: int,
    partial: float = 1.0,
    types: tuple[str, ...] = tuple(ROPE_TYPES),
    original: int | None = None,
) -> dict[str, Any]:
    """`rope_base`, `rope_scaling`, and `rope_width` where not all of a head is turned, of one mapping of parameters.

    base, partial: where it does not say. types: the rope types that the family has. longest, original: the family's
    defaults of `max_position_embeddings` and of the length of training.
    """
    given = {name: value for name, value in given.items() if value is not None}
    base, partial = given.pop("rope_theta", base), given.pop("partial_rotary_factor", partial)
    if not is_number(base) or not is_number(partial) or not 0 < partial <= 1:
        raise ValueError(f"{c.where}: rope_theta={base!r} and partial_rotary_factor={partial!r}; expected numbers")
    width = int(head_dim * partial)
    old_name = given.pop("type", "default")
    kind = given.pop("rope_type", old_name)
    if kind in ("su", "yarn") and "yarn" not in types:  # Phi-3's older names
        kind = "longrope"
    if kind not in types:
        raise ValueError(f"{c.where}: rope type {kind!r} is not supported here; supported: {', '.join(types)}")
    options: dict[str, Any] = {"rope_base": float(base), "rope_scaling": None}
    if width != head_dim:
        options["rope_width"] = width
    if kind == "default":
        return options
    known = {field.name for field in dataclasses.fields(ROPE_TYPES[kind])}
    if unread := sorted(given.keys() - known - {"finetuned", "original_max_position_embeddings"}):
        c.unread(f"rope_parameters.{name}" for name in unread)
    scaling = {name: value for name, value in given.items() if name in known}
    if kind in NEEDS_LENGTH:
        scaling |= _lengths(c, kind, scaling, original, longest)
    if kind == "yarn":  # 0 counts as left out there
        scaling = {name: value for name, value in scaling.items() if value or name not in ("beta_fast", "beta_slow")}
    return options | {"rope_scaling": freeze_rope_scaling({"rope_type": kind, **scaling})}


def _lengths(c: Fields, kind: str, scaling: Mapping[str, Any], original: int | None, longest: int) -> dict[str, Any]:
    """The length of training, and the factor where it follows from that."""
    longest = c.whole("max_position_embeddings", longest)
    if kind == "dynamic":  # its length is that of the model whatever else stands there
        original = longest
    else:  # a field of the model's own comes first
        of_model = c.whole("original_max_position_embeddings", original)
        original = of_model or scaling.get("original_max_position_embeddings") or longest
    lengths: dict[str, Any] = {"original_max_position_embeddings": original}
    if "factor" not in scaling and kind in ("yarn", "longrope"):
        lengths["factor"] = max(1.0, longest / original)
    return lengths


def write_rope(options: Any) -> dict[str, Any]:
    """The fields, by their older names, which every version reads. options: of a mixer with RoPE."""
    fields: dict[str, Any] = {"rope_theta": float(options.rope_base), "rope_scaling": None}
    if options.rope_scaling is not None:
        scaling = {name: list(v) if isinstance(v, tuple) else v for name, v in options.rope_scaling.items()}
        fields["rope_scaling"] = scaling
        if scaling["rope_type"] == "dynamic":
            fields["max_position_embeddings"] = scaling.pop("original_max_position_embeddings")
    return fields
