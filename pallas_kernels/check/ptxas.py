"""What NVIDIA's assembler says about the kernels of Mosaic GPU.

Mosaic GPU prints it to the file descriptors 1 and 2 when DUMPS stand in the environment before JAX is imported, each
kernel once in a process: one that was compiled before is taken from memory, silently.
"""

import dataclasses
import re

DUMPS = {"MOSAIC_GPU_DUMP_PTXAS": "1", "MOSAIC_GPU_DUMP_SASS": "1", "MOSAIC_GPU_DUMP_RESOURCES": "1"}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """registers: of a thread. stack, spill_stores, spill_loads: bytes of a thread. warnings: of the assembler.

    hgmma: matrix instructions of Hopper in the machine code; None where nvdisasm is not installed, which reads it.
    """

    name: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    hgmma: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def spills(self) -> int:
        return self.spill_stores + self.spill_loads


_ENTRY = re.compile(r"Compiling entry function '(?P<name>[^']+)' for '(?P<architecture>[^']+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_WARNING = re.compile(
    r"^ptxas (?:warning|info)\s*:\s*(?P<text>(?:\(C\d+\) )?.*(?:Potential Performance Loss|setmaxnreg).*)$"
)
_CODE = re.compile(r"^\s*\.section\s+\.text\.(?P<name>\w+)")


def kernels(text: str) -> list[Kernel]:
    """In the order in which they were compiled. text: what was printed while they were."""
    found: list[dict] = []
    products: dict[str, list[int]] = {}  # of the kernels of a name, in their order
    code, warnings = None, []
    for line in text.splitlines():
        if match := _ENTRY.search(line):
            found.append({"name": match["name"], "warnings": tuple(warnings)})
            warnings = []
        elif (match := _WARNING.match(line)) and found:
            found[-1]["warnings"] += (match["text"],)
        elif match := _WARNING.match(line):
            warnings.append(match["text"])
        elif (match := _SPILLS.search(line)) and found:  # functions that were not inlined have lines of their own
            numbers = dict(zip(("stack", "spill_stores", "spill_loads"), map(int, match.groups()), strict=True))
            found[-1].update({name: found[-1].get(name, 0) + number for name, number in numbers.items()})
        elif (match := _REGISTERS.search(line)) and found:
            found[-1]["registers"] = int(match[1])
        elif match := _CODE.match(line):
            code = products.setdefault(match["name"], [])
            code.append(0)
        elif code is not None and "HGMMA" in line:
            code[-1] += 1
    whole = [kernel for kernel in found if "registers" in kernel]
    return [
        Kernel(**kernel, hgmma=next(iter(products.get(kernel["name"], [])[i:]), None)) for i, kernel in _numbered(whole)
    ]


def _numbered(found: list[dict]) -> list[tuple[int, dict]]:
    """Each with how many of its name come before it."""
    names = [kernel["name"] for kernel in found]
    return [(names[:at].count(kernel["name"]), kernel) for at, kernel in enumerate(found)]


def shared_memory(text: str) -> int | None:
    """Bytes of the kernel that asks for most, of those that were traced while the text was printed."""
    return max((int(number) for number in re.findall(r"Resources\(smem_scratch_bytes=(\d+)", text)), default=None)


def calls(program: str) -> list[tuple[str, str]]:
    """(name, hash) of the Mosaic GPU kernels that a compiled program calls. program: its text."""
    found = re.findall(
        r'custom_call_target="mosaic_gpu[^\n]*?op_name="([^"]*)"[^\n]*?kernel_hash = ("(?:[^"\\]|\\.)*")', program
    )
    return [(name.split("/")[-2] if "/" in name else name, digest) for name, digest in found]
