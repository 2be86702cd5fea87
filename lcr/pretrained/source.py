"""Where a model was loaded from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Source:
    """What an export takes over from the checkpoint that a model was loaded from.

    family: its `model_type`. fields: its config.json. dtype: of most of its tensors; dtypes: (name, dtype) of the
        others.
    """

    family: str
    fields: str
    dtype: str
    dtypes: tuple[tuple[str, str], ...]
