"""Where a model was loaded from."""

import dataclasses
import json
from pathlib import Path

FILE = "source.json"  # of a run that began from a checkpoint


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


def write_source(source: Source, workdir: Path) -> None:
    """Keeps it in a run's folder, for the day when the run is handed back."""
    (workdir / FILE).write_text(json.dumps(dataclasses.asdict(source), indent=2) + "\n", encoding="utf-8")


def read_source(workdir: Path) -> Source | None:
    """That of a run, None where it began from no checkpoint. Raises: ValueError for a damaged file."""
    path = workdir / FILE
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        source = Source(**kept | {"dtypes": tuple((name, kind) for name, kind in kept["dtypes"])})
        assert isinstance(json.loads(source.fields), dict)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        mend = "remove it to do without what the checkpoint said"
        raise ValueError(f"{path} is damaged ({error!r}); {mend}") from None
    return source
