"""What the TPU compiler says about a kernel: the static schedule in the files that it dumps.

It writes them to the folder of `dumps(folder)`, which has to stand in the environment before JAX is imported. A bundle
is what the core starts in one cycle, so that the bundles of a loop are its cycles where nothing stalls.
"""

import dataclasses
import re
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(?P<label>LH|LB|LE|PB|PF|CT)?\s*:\s?(?P<depth>[> ]*)\{(?P<code>.*)$")
_ALLOCATION = re.compile(r"#allocation\d+ \[shape = [^\n]*?space=vmem, size = (0x[0-9a-f]+)")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_START = re.compile(r"Start(?:/End empty)? region (\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder (\(%\S+\), )?%\S+, (\d+) /\* loop exit test")
_NOT_NOUGHT = re.compile(r"%(p\d+_p\d+) = scmp\.ne\.s32\.totalorder %\S+, 0(?!\d)")
DELAYED = 4  # bundles after a branch, which start whether it is taken or not
CALL = "tpu_custom_call"
_CALL = re.compile(rf'%(\S+) = [^\n]*? custom-call\([^\n]*?custom_call_target="{CALL}"')


# All of its seventy phases take a multiple of the time to compile.
PHASES = ".*(post-delay-converter|final_hlo|final_bundles).*"


def dumps(folder: str | Path) -> dict[str, str]:
    arguments = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex={PHASES}"
    return {"LIBTPU_INIT_ARGS": arguments}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """depth: of the loops around it. label: what begins with it ("LB": the body of a loop). code: its instructions."""

    depth: int
    label: str | None
    code: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """vmem: bytes that it allocates, windows of its operands included.

    bundles: of the whole. step: those of a step of the grid, inner loops counted once (all of them, where there is no
    grid). cycles: those of a step, inner loops counted as often as they turn, without what is skipped where an index is
    not 0, as it is in all but the first chunk of a row; None where a loop does not turn a fixed number of times. loops:
    the bundles of each loop inside a step. steps: how often the loop over the grid runs, its steps and what fills and
    drains its pipeline; 1 without a grid. tiles: the bundles of each part of a step that has matrix products and does
    not run once in every step: a loop, or what is skipped on a condition. optional: the bundles of what else is skipped
    on a condition, as what begins or ends a row of tiles. inside: those of what is skipped in tiles and has no matrix
    products. others: the bundles of each loop that is no tile and in none. products: of a step's cycles (or bundles, if
    those are not known), the share that starts a matrix product (with libtpu 0.0.50 and before: or loads weights for
    one). spills, fills: vector registers that are stored and loaded again for want of registers, at one pass through
    all of the code.
    """

    name: str
    vmem: int
    bundles: int
    step: int
    cycles: int | None
    loops: tuple[int, ...]
    steps: int
    tiles: tuple[int, ...]
    optional: int
    inside: int
    others: tuple[int, ...]
    products: float
    spills: int
    fills: int


def calls(program: str) -> list[str]:
    """The names of the kernels that a compiled program calls. program: its text."""
    return _CALL.findall(program)


def kernel(name: str, folder: Path) -> Kernel:
    """Raises: FileNotFoundError if the compiler has dumped no kernel of this name."""
    bundles = read_bundles(_file(folder, name, "final_bundles").read_text())
    slots, used = read_utilization(_file(folder, name, "final_hlo-static-per-bundle-utilization").read_text())
    allocations = _ALLOCATION.findall(_file(folder, name, "post-delay-converter").read_text())
    whole = loops(bundles)
    column = {slot: number for number, slot in enumerate(slots)}
    units = column.get("MATMUL", column.get("MXU"))  # libtpu 0.0.50 counts products and the loading of weights together
    first, last = max(whole.get(0, [(0, len(bundles))]), key=lambda span: span[1] - span[0])
    if any(row[units] for row in used[:first] + used[last:]):  # a grid of one step has no loop
        first, last = 0, len(bundles)
    else:
        whole.pop(0, None)
    inner = [(start, end) for spans in whole.values() for start, end in spans if first <= start < last]
    conditional = [span for span in skipped(bundles) if first < span[0] and span[1] <= last and not within(span, inner)]
    spans = [span for span in inner + conditional if any(row[units] for row in used[slice(*span)])]
    tiles = sorted(span for span in spans if not any(within(other, [span]) for other in spans))
    outside = {span for span in conditional if span not in spans and not within(span, tiles)}
    parts = {span for span in skipped(bundles) if within(span, tiles)}
    parts = {span for span in parts if not any(row[units] for row in used[slice(*span)])}
    optional, inside = (
        sum(end - start for start, end in found if not within((start, end), list(found))) for found in (outside, parts)
    )
    others = [span for span in inner if span not in tiles and not within(span, tiles + list(outside))]
    times = turns(bundles, first, last, inner)
    weights = times or [1] * (last - first)
    return Kernel(
        name=name,
        vmem=sum(int(size, 16) for size in allocations),
        bundles=len(bundles),
        step=last - first,
        cycles=times and sum(times),
        loops=tuple(end - start for start, end in inner),
        steps=grid_steps(bundles[first:last]) if last - first < len(bundles) else 1,
        tiles=tuple(end - start for start, end in tiles),
        optional=optional,
        inside=inside,
        others=tuple(end - start for start, end in others),
        products=sum(n for n, row in zip(weights, used[first:last], strict=True) if row[units]) / max(sum(weights), 1),
        spills=sum(row[column["VSTORE:SPILL"]] for row in used),
        fills=sum(row[column["VLOAD:FILL"]] for row in used),
    )


def read_bundles(text: str) -> list[Bundle]:
    found: list[Bundle] = []
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            found.append(Bundle(match["depth"].count(">"), match["label"], match["code"]))
        elif found:  # a comment of several lines
            found[-1] = dataclasses.replace(found[-1], code=f"{found[-1].code}\n{line}")
    return found


def skipped(bundles: list[Bundle]) -> list[tuple[int, int]]:
    """What branches forward may leave out: where it begins, and the first bundle after it."""
    starts = {int(n): at for at, bundle in enumerate(bundles) for n in _START.findall(bundle.code)}
    branches = (
        (at + 1, starts.get(int(n), 0)) for at, bundle in enumerate(bundles) for n in _BRANCH.findall(bundle.code)
    )
    return [(start, end) for start, end in branches if end > start]


def turns(bundles: list[Bundle], first: int, last: int, inner: list[tuple[int, int]]) -> list[int] | None:
    """How often a step of the grid, from `first` to `last`, starts each of its bundles: see `Kernel.cycles`."""
    code = "\n".join(bundle.code for bundle in bundles[first:last])
    elsewhere = {name for name in _NOT_NOUGHT.findall(code)}
    # The exit test of an inner loop, guarded by nothing, before that of one around it, which may stand in the inner one
    tests = [(bool(guard), at, int(n)) for at in range(first, last) for guard, n in _EXIT.findall(bundles[at].code)]
    times = [1] * (last - first)
    for start, end in sorted(inner, key=lambda span: span[1] - span[0]):
        own = min((test for test in tests if start <= test[1] < end), default=None)
        if own is None:
            return None
        tests.remove(own)
        for at in range(start, end):
            times[at - first] *= own[2]
    for start, end in skipped(bundles):
        branch = re.search(r"sbr\.rel \(%(p\d+_p\d+)\)", bundles[start - 1].code)
        # Never most of a step: the predicate that guards it all may be kept in a scalar, and is read back the same way
        if first <= start and end <= last and end - start < (last - first) / 2 and branch and branch[1] in elsewhere:
            times[start - first : end - first] = [0] * (end - start)
    return times


def grid_steps(loop: list[Bundle]) -> int:
    """How often a loop runs, by the constant in its exit test."""
    return max(int(number) for bundle in loop for _, number in _EXIT.findall(bundle.code))


def within(span: tuple[int, int], others: list[tuple[int, int]]) -> bool:
    """Whether one of the others, and not itself, holds the span."""
    return any(start <= span[0] and span[1] <= end and (start, end) != span for start, end in others)


def loops(bundles: list[Bundle]) -> dict[int, list[tuple[int, int]]]:
    """Where the loops of each depth (0: the outermost) begin, and the first bundle after each.

    A loop ends with its branch back and what this delays. All before belongs to it, whatever depth it is marked with:
    the compiler moves code of after a loop up into it.
    """
    branches: dict[str, int] = {}
    for at, bundle in enumerate(bundles):
        branches |= dict.fromkeys(_BRANCH.findall(bundle.code), at)
    found: dict[int, list[tuple[int, int]]] = {}
    for start, bundle in enumerate(bundles):
        if bundle.label == "LB":
            back = max((branches.get(region, -1) for region in _START.findall(bundle.code)), default=-1)
            if back < start:
                raise ValueError(f"no branch back to the loop that begins with bundle {start}: {bundle.code[:100]}")
            found.setdefault(bundle.depth - 1, []).append((start, back + DELAYED + 1))
    return found


def read_utilization(text: str) -> tuple[list[str], list[list[int]]]:
    """The names of the slots, and how many of each every bundle uses."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("== UTILIZATION"))
    return [slot.strip() for slot in lines[1].split(",")], [
        [int(n) for n in line.split()] for line in lines[start + 1 :] if line
    ]


def _file(folder: Path, name: str, phase: str) -> Path:
    found = [
        path
        for path in folder.iterdir()
        if re.fullmatch(rf"\d+-{re.escape(name)}-\d+-{re.escape(phase)}\.txt", path.name)
    ]
    if not found:
        raise FileNotFoundError(f"{folder}: no file {phase} of the kernel {name}")
    return max(found)
