"""Programs that NumPy evaluates, equation by equation, where XLA would compile them: `evaluated(f)` for `jax.jit(f)`.

A simulated kernel is some thousand small operations between calls of JAX's interpreter: XLA compiles each of them,
and runs it a few times, so that compiling takes ten times as long as all else. A reference runs once, too. What is
evaluated is what JAX traces, the interpreters' own programs included: memory, copies, barriers and the search for races
are JAX's.
"""

import functools
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
from jax._src import core
from jax._src.pallas import mpmd, pallas_call
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.state.discharge import discharge_state
from numpy_primitives import RULES, compiled


def evaluated(function: Callable) -> Callable:
    """As `jax.jit(function)`, but that it is traced in each call, and that its results are NumPy arrays."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        return traced(lambda args, kwargs: function(*args, **kwargs), args, kwargs)()

    return run


def traced(function: Callable, *args: Any) -> Callable[[], Any]:
    """The evaluation of function(*args), traced once: each call of it evaluates anew."""
    # A function of its own: JAX would remember the trace of one that it knows, made before a test changed a constant.
    jaxpr, shapes = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*args)
    if any(isinstance(effect, core.InternalMutableArrayEffect) for effect in jaxpr.effects):
        jaxpr = discharge_state(jaxpr)  # arrays that kernels write in place
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(args)]

    def run():
        # where an interpreter has several threads at once, each runs a program of its own
        with mock.patch.object(thread_map, "_run_jaxpr", lambda jaxpr, consts, *args: _evaluate(jaxpr, consts, args)):
            found = _evaluate(jaxpr, jaxpr.consts, leaves)
        return jax.tree.unflatten(jax.tree.structure(shapes), [np.asarray(x) for x in found])

    return run


def _evaluate(jaxpr, consts, args):
    with np.errstate(all="ignore"):
        return _prepared(jaxpr).run(*consts, *args)


class Program(NamedTuple):
    """template: the values by their places, those of literals filled in. steps: (function, places of the operands,
    place of the result, or of the results in a list)."""

    template: list
    inputs: list[int]
    steps: list[tuple]
    outputs: list[int]

    def run(self, *args):
        values = self.template.copy()
        for place, value in zip(self.inputs, args, strict=True):
            values[place] = value
        for function, operands, results in self.steps:
            found = function(*[values[place] for place in operands])
            if isinstance(results, int):
                values[results] = found
            else:
                for place, value in zip(results, found, strict=True):
                    values[place] = value
        return [values[place] for place in self.outputs]


_programs: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()
_preparing = threading.RLock()


def _prepared(jaxpr) -> Program:
    with _preparing:
        if jaxpr not in _programs:
            _programs[jaxpr] = _prepare(jaxpr)
        return _programs[jaxpr]


def _prepare(jaxpr) -> Program:
    """Its inputs: the constants, then the arguments."""
    template, places = [], {}

    def place(atom):
        if isinstance(atom, core.Literal):
            template.append(np.asarray(atom.val, atom.aval.dtype))
            return len(template) - 1
        if atom not in places or isinstance(atom, core.DropVar):
            places[atom] = len(template)
            template.append(None)
        return places[atom]

    inputs = [place(variable) for variable in jaxpr.all_invars]
    steps = []
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        operands = [place(atom) for atom in equation.invars]
        function = (CONTROL.get(name) or RULES.get(name) or compiled)(equation)
        results = [place(variable) for variable in equation.outvars]
        steps.append((function, operands, results if equation.primitive.multiple_results else results[0]))
    return Program(template, inputs, steps, [place(atom) for atom in jaxpr.outvars])


def _closed(jaxpr) -> Callable:
    return functools.partial(_prepared(jaxpr).run, *jaxpr.consts)


def _call(name):
    return lambda equation: _closed(equation.params[name])


def _cond(equation):
    branches = [_closed(branch) for branch in equation.params["branches"]]
    return lambda which, *operands: branches[min(max(int(which), 0), len(branches) - 1)](*operands)


def _while(equation):
    parameters = equation.params
    condition, body = _closed(parameters["cond_jaxpr"]), _closed(parameters["body_jaxpr"])
    first = parameters["cond_nconsts"]
    second = first + parameters["body_nconsts"]

    def run(*operands):
        carry = operands[second:]
        while condition(*operands[:first], *carry)[0]:
            carry = body(*operands[first:second], *carry)
        return carry

    return run


def _scan(equation):
    parameters = equation.params
    body, length = _closed(parameters["jaxpr"]), parameters["length"]
    consts, carried, _ = (len(part) for part in parameters["ft_in"].unpack())
    rows = reversed(range(length)) if parameters["reverse"] else range(length)
    rows = list(rows)
    stacked = [variable.aval for variable in equation.outvars[carried:]]

    def run(*operands):
        shared, carry, lines = operands[:consts], operands[consts : consts + carried], operands[consts + carried :]
        outputs = [np.empty(aval.shape, aval.dtype) for aval in stacked]
        for row in rows:
            found = body(*shared, *carry, *[line[row] for line in lines])
            carry = found[:carried]
            for output, value in zip(outputs, found[carried:], strict=True):
                output[row] = value
        return [*carry, *outputs]

    return run


def _callback(equation):
    """Copies, both ways: what is called keeps what it gets, and gives out pieces of it."""
    call, avals = equation.params["callback"], equation.params["result_avals"]

    def run(*operands):
        found = [np.array(x) for x in call(*[np.array(x) for x in operands])]
        for x, aval in zip(found, avals, strict=True):
            assert (x.shape, x.dtype) == (aval.shape, aval.dtype), f"{x.dtype}{x.shape} instead of {aval}"
        return found

    return run


def _kernel(equation):
    """A simulated kernel: the program that JAX's interpreter makes of it."""
    interpreter = []
    avals = [atom.aval for atom in equation.invars]
    of_pallas_call = equation.primitive.name == "pallas_call"
    lower = pallas_call._pallas_call_lowering if of_pallas_call else mpmd._mpmd_map_fallback_lowering

    def lower_fun(function, multiple_results):
        interpreter.append(function)
        return lambda context, *operands: None

    stand_in = types.SimpleNamespace(**vars(pallas_call.mlir) | {"lower_fun": lower_fun})
    with mock.patch.object(pallas_call, "mlir", stand_in):
        lower(types.SimpleNamespace(avals_in=avals), *range(len(avals)), **equation.params)
    return _closed(jax.make_jaxpr(interpreter[0])(*avals))


CONTROL = {
    "jit": _call("jaxpr"),
    "remat2": _call("jaxpr"),
    "closed_call": _call("call_jaxpr"),
    "eval_jaxpr": _call("call_jaxpr"),
    "custom_jvp_call": _call("call_jaxpr"),
    "custom_vjp_call": _call("call_jaxpr"),
    "custom_vmap_call": _call("call"),
    "cond": _cond,
    "while": _while,
    "scan": _scan,
    "io_callback": _callback,
    "pallas_call": _kernel,
    "mpmd_map": _kernel,
}
