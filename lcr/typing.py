"""The glossary: shape letters and the array types that public functions name.

    B  batch              T  tokens in this call     S  tokens held (keys)
    D  model width        H  heads                   G  key-value heads
    K  key/query width    V  value width             N  SSM state size
    C  chunk length       W  window                  E  experts
    L  layers             P  chosen positions

A width that is not the model's has a name of its own (`inner`, `vocab`).
"""

from typing import Any

from jaxtyping import Array, Bool, Float, Int, PyTree

type Activations = Float[Array, "B T D"]
type Tokens = Int[Array, "B T"]
type SegmentIds = Int[Array, "B T"]
type PerRow = Int[Array, "B"]
type State = PyTree[Any]
# A field of a state. Transformations build states of other things than arrays of the documented shape (stacked
# layers, shapes without data, tracers of a vmap), so the shape stands in a comment beside the field.
Leaf = Any

__all__ = ["Activations", "Array", "Bool", "Float", "Int", "Leaf", "PerRow", "PyTree", "SegmentIds", "State", "Tokens"]
