"""How an op chooses among its implementations: a name is obeyed or raises; a default is logged once."""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping

logger = logging.getLogger("pallas_kernels")


def choose(op: str, implementations: Mapping[str, Callable], name: str | None, default: str) -> Callable:
    """The implementation called `name`, or the default (logged the first time it is chosen).

    Raises: ValueError for a name that the op does not have, naming the nearest and listing all.
    """
    if name is None:
        _log_once(op, default)
        return implementations[default]
    if name not in implementations:
        close = difflib.get_close_matches(str(name), implementations, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"implementation={name!r}: {op} has {', '.join(sorted(implementations))}.{hint}")
    return implementations[name]


@functools.cache
def _log_once(op: str, name: str) -> None:
    logger.info("%s: using the %r implementation", op, name)
