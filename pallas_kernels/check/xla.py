"""What a program of plain XLA would take on a TPU: the compiler's own estimates, and the least that products take."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_LOOP = re.compile(r" while\(.*condition=%([^\s,]+), body=%([^\s,]+)")
_BRANCHES = re.compile(
    r" conditional\(.*(?:branch_computations=\{([^}]*)\}|true_computation=%([^\s,]+), false_computation=%([^\s,]+))"
)
_CONSTANT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")


def cycles(program: str) -> int | None:
    """The cycles that XLA's cost model gives each of a program's operations, loops as often as they turn; of what is
    chosen on a condition the cheapest. Kernels, of which XLA knows nothing, count as nothing.

    program: the text of a compiled one. None if it has a loop whose number of turns cannot be read.
    """
    bodies: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            entry = name if line.startswith("ENTRY") else entry
            bodies[name] = []
        elif name:
            bodies[name].append(line)

    def turns(condition: str) -> int | float:
        found = [int(number) for line in bodies[condition] for number in _CONSTANT.findall(line)]
        return found[0] if len(found) == 1 else math.nan

    def of(computation: str) -> int | float:
        total = 0
        for line in bodies[computation]:
            if match := _LOOP.search(line):
                total += turns(match[1]) * of(match[2])
            elif match := _BRANCHES.search(line):
                names = match[1].replace("%", "").split(", ") if match[1] else match.groups()[1:]
                total += min(of(name) for name in names)
            elif match := _ESTIMATE.search(line):
                total += int(match[1])
        return total

    total = of(entry)
    return None if math.isnan(total) else round(total)


def products(function: Callable, *arguments: Any) -> int:
    """Multiply-accumulates of the matrix products of a function of arrays (or of their shapes), loops as often as they
    turn; of what is chosen on a condition the cheapest."""
    return _products(jax.make_jaxpr(function)(*arguments).jaxpr)


def _products(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif equation.primitive.name == "cond":
            total += min(_products(branch.jaxpr) for branch in equation.params["branches"])
        else:
            total += equation.params.get("length", 1) * sum(map(_products, _inner(equation.params)))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        if hasattr(value, "eqns"):
            yield value
        elif hasattr(value, "jaxpr") and hasattr(value.jaxpr, "eqns"):
            yield value.jaxpr
