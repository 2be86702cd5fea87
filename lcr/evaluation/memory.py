"""The most memory that a stretch of work needed."""

import re
import resource
import sys
from pathlib import Path

import jax

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak() -> bool:
    """Starts a new stretch: sets the resident-set high-water mark of this process back to what it holds now.

    Linux only (it writes 5 to /proc/self/clear_refs). Elsewhere, and for the memory of an accelerator, nothing can
    be reset and the mark is that of the whole process: measure from the smallest case to the largest.

    Returns whether the mark was reset.
    """
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # another system, or a container that forbids it
        return False
    return True


def peak_bytes() -> int:
    """Bytes at the high-water mark: of the accelerator's memory if there is one, else of the process's resident set."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in statistics:
        return int(statistics["peak_bytes_in_use"])
    return resident_peak_bytes()


def resident_peak_bytes() -> int:
    """Bytes at the high-water mark of this process's resident set (VmHWM, or `ru_maxrss` where there is no /proc)."""
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found:
        return int(found.group(1)) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, the others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
