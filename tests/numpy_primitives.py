"""What each primitive of JAX computes, in NumPy: RULES[name](equation) is a function of operands (numpy_programs.py).

No function changes what it is given: results may be views of it.
"""

import functools
import math

import jax
import numpy as np
from jax.lax import GatherScatterMode


def _always(function):
    return lambda equation: function


def _in_float32(function):
    """Of halves too: bfloat16 is no dtype of NumPy's own."""

    def run(x):
        return function(x) if x.dtype.itemsize >= 4 else function(x.astype(np.float32)).astype(x.dtype)

    return _always(run)


def _quotient(x, y):
    if x.dtype.kind not in "iu":
        return x / y
    return ((x - np.fmod(x, y)) // y).astype(x.dtype)  # towards 0


def _shift(function, filled):
    def run(x, count):
        width = 8 * x.dtype.itemsize
        inside = (count >= 0) & (count < width)
        return np.where(inside, function(x, np.where(inside, count, 0).astype(x.dtype)), filled(x)).astype(x.dtype)

    return _always(run)


def _shift_right_logical(x, count):
    unsigned = np.dtype(f"u{x.dtype.itemsize}")
    return np.right_shift(x.view(unsigned), count.view(unsigned)).view(x.dtype)


def _integer_pow(equation):
    exponent = equation.params["y"]

    def run(x):
        power, factor, left = None, x, abs(exponent)
        while left:
            if left & 1:
                power = factor if power is None else power * factor
            factor, left = factor * factor, left >> 1
        power = np.ones_like(x) if power is None else power
        return power if exponent >= 0 else np.ones((), x.dtype) / power

    return run


def _select(which, *cases):
    return np.where(which, cases[1], cases[0]) if which.dtype == bool else np.choose(which, cases)


def _convert(equation):
    dtype = np.dtype(equation.params["new_dtype"])

    def run(x):
        if dtype.kind in "iu" and x.dtype.kind not in "iub":  # NaN is 0, and what is too large the largest
            limits = np.iinfo(dtype)
            x = x.astype(np.float64)
            inside = np.where((x > limits.min) & (x < limits.max), x, 0).astype(dtype)
            return np.where(x >= limits.max, limits.max, np.where(x <= limits.min, limits.min, inside)).astype(dtype)
        return x.astype(dtype, copy=False)

    return run


def _bitcast(equation):
    dtype = np.dtype(equation.params["new_dtype"])

    def run(x):
        if x.dtype.itemsize == dtype.itemsize:
            return x.view(dtype)
        if x.dtype.itemsize > dtype.itemsize:
            return np.ascontiguousarray(x)[..., None].view(dtype)
        return np.ascontiguousarray(x).view(dtype)[..., 0]

    return run


def _bitcast_rows(equation):
    """A TPU's: neighbours in one axis are packed into one, or unpacked."""
    dtype, axis = np.dtype(equation.params["ty"]), equation.params["dim"]
    return lambda x: np.swapaxes(np.ascontiguousarray(np.swapaxes(x, axis, -1)).view(dtype), axis, -1)


def _multiple_of(equation):
    values = equation.params["values"]

    def run(x):
        for n in [values] if isinstance(values, int) else values:
            assert x % n == 0, f"{x} is no multiple of {n}"
        return x

    return run


def _broadcast_in_dim(equation):
    shape, places = equation.params["shape"], equation.params["broadcast_dimensions"]
    given = [1] * len(shape)
    for place, size in zip(places, equation.invars[0].aval.shape, strict=True):
        given[place] = size
    return lambda x, *_: np.broadcast_to(np.reshape(x, given), shape)


def _iota(equation):
    shape, dimension = equation.params["shape"], equation.params["dimension"]
    line = np.arange(shape[dimension]).astype(equation.params["dtype"])
    array = np.broadcast_to(line.reshape([-1 if i == dimension else 1 for i in range(len(shape))]), shape)
    return lambda *_: array


def _reshape(equation):
    shape = equation.outvars[0].aval.shape
    assert equation.params.get("dimensions") is None
    return lambda x, *_: np.reshape(x, shape)


def _transpose(equation):
    permutation = equation.params["permutation"]
    return lambda x: np.transpose(x, permutation)


def _slice(equation):
    starts, limits, strides = (equation.params[name] for name in ("start_indices", "limit_indices", "strides"))
    cut = tuple(slice(*line) for line in zip(starts, limits, strides or [1] * len(starts), strict=True))
    return lambda x: x[cut]


def _start(x, starts, sizes):
    return tuple(
        slice(begin, begin + size)
        for begin, size in (
            (min(max(int(start), 0), whole - size), size)
            for start, whole, size in zip(starts, x.shape, sizes, strict=True)
        )
    )


def _dynamic_slice(equation):
    sizes = equation.params["slice_sizes"]
    return lambda x, *starts: x[_start(x, starts[: len(sizes)], sizes)]


def _dynamic_update_slice(x, update, *starts):
    x = np.array(x)
    x[_start(x, starts, update.shape)] = update
    return x


def _concatenate(equation):
    axis = equation.params["dimension"]
    return lambda *arrays: np.concatenate(arrays, axis=axis)


def _stack(equation):
    axis = equation.params["axis"]
    return lambda *arrays: np.stack(arrays, axis=axis)


def _unstack(equation):
    axis = equation.params["axis"]
    return lambda x: list(np.moveaxis(x, axis, 0))


def _split(equation):
    axis, ends = equation.params["axis"], np.cumsum(equation.params["sizes"])[:-1]
    return lambda x: np.split(x, ends, axis=axis)


def _pad(equation):
    config, shape = equation.params["padding_config"], equation.outvars[0].aval.shape
    places, cuts = [], []
    for (low, _, inner), size, padded in zip(config, equation.invars[0].aval.shape, shape, strict=True):
        at = low + np.arange(size) * (inner + 1)
        inside = np.flatnonzero((at >= 0) & (at < padded))
        cuts.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
        places.append(slice(at[inside[0]], at[inside[-1]] + 1, inner + 1) if inside.size else slice(0, 0))
    places, cuts = tuple(places), tuple(cuts)

    def run(x, filling):
        out = np.full(shape, filling, x.dtype)
        out[places] = x[cuts]
        return out

    return run


def _squeeze(equation):
    shape = equation.outvars[0].aval.shape
    return lambda x: np.reshape(x, shape)


def _rev(equation):
    axes = equation.params["dimensions"]
    return lambda x: np.flip(x, axes)


def _reduction(function):
    def rule(equation):
        axes = tuple(equation.params["axes"])

        def run(x):
            wide = x.astype(np.float32) if x.dtype.kind not in "iub" and x.dtype.itemsize < 4 else x
            return function(wide, axis=axes).astype(x.dtype)

        return run

    return rule


def _argument(function):
    def rule(equation):
        (axis,), dtype = equation.params["axes"], equation.params["index_dtype"]
        return lambda x: function(x, axis=axis).astype(dtype)

    return rule


def _cumulative(function):
    def rule(equation):
        axis, reverse = equation.params["axis"], equation.params["reverse"]

        def run(x):
            wide = x.astype(np.float32) if x.dtype.kind not in "iub" and x.dtype.itemsize < 4 else x
            wide = np.flip(wide, axis) if reverse else wide
            found = function.accumulate(wide, axis=axis).astype(x.dtype)
            return np.flip(found, axis) if reverse else found

        return run

    return rule


def _dot_general(equation):
    """As a matrix product for each of the batch; of halves in float32, as on every device."""
    ((of_x, of_y), (batch_x, batch_y)), out = equation.params["dimension_numbers"], equation.outvars[0].aval
    x, y = (operand.aval for operand in equation.invars)
    free_x = [i for i in range(x.ndim) if i not in (*of_x, *batch_x)]
    free_y = [i for i in range(y.ndim) if i not in (*of_y, *batch_y)]
    batch, inner = ([x.shape[i] for i in axes] for axes in (batch_x, of_x))
    rows, columns = (math.prod(a.shape[i] for i in free) for a, free in ((x, free_x), (y, free_y)))
    inner = math.prod(inner)
    widest = np.result_type(*(np.float32 if a.dtype.itemsize < 4 else a.dtype for a in (x, y, out)))

    def run(x, y):
        x = np.transpose(x, (*batch_x, *free_x, *of_x)).reshape(*batch, rows, inner).astype(widest, copy=False)
        y = np.transpose(y, (*batch_y, *of_y, *free_y)).reshape(*batch, inner, columns).astype(widest, copy=False)
        return np.matmul(x, y).reshape(out.shape).astype(out.dtype, copy=False)

    return run


def _gather(equation):
    names, sizes, mode = (equation.params[name] for name in ("dimension_numbers", "slice_sizes", "mode"))
    operand = equation.invars[0].aval
    collapsed = {*names.collapsed_slice_dims, *names.operand_batching_dims}
    inner = [d for d in range(operand.ndim) if d not in collapsed]
    rank = equation.outvars[0].aval.ndim

    def run(x, indices):
        batch = indices.ndim - 1
        at, outside = [0] * x.ndim, np.zeros(indices.shape[:-1], bool)
        for column, d in enumerate(names.start_index_map):
            start, last = indices[..., column].astype(np.int64), x.shape[d] - sizes[d]
            outside |= (start < 0) | (start > last)
            at[d] = np.clip(start, 0, last)
        for line, d in zip(names.start_indices_batching_dims, names.operand_batching_dims, strict=True):
            at[d] = np.arange(x.shape[d]).reshape([-1 if i == line else 1 for i in range(batch)])
        places = []
        for d in range(x.ndim):
            start = np.reshape(at[d], np.shape(at[d]) + (1,) * len(inner)) if np.ndim(at[d]) else at[d]
            within = np.arange(sizes[d]).reshape([-1 if e == d else 1 for e in inner]) if d in inner else 0
            places.append(start + within)
        found = x[tuple(places)]
        found = np.broadcast_to(found, indices.shape[:-1] + tuple(sizes[d] for d in inner))
        if mode == GatherScatterMode.FILL_OR_DROP and outside.any():
            filling = np.asarray(equation.params["fill_value"]).astype(x.dtype)
            found = np.where(outside.reshape(outside.shape + (1,) * len(inner)), filling, found)
        rest = [i for i in range(rank) if i not in names.offset_dims]
        return np.transpose(found, np.argsort([*rest, *names.offset_dims]))

    return run


def _roll(equation):
    axis = equation.params["axis"]
    assert equation.params["stride"] is None
    return lambda x, shift: np.roll(x, int(shift), axis)


def _clamp(low, x, high):
    return np.minimum(np.maximum(x, low), high)


RULES = {
    **{name: _in_float32(getattr(np, name)) for name in "exp exp2 expm1 log log1p tanh sin cos sqrt".split()},
    "floor": _in_float32(np.floor),
    "ceil": _in_float32(np.ceil),
    "square": _always(np.square),
    "sign": _always(np.sign),
    "rsqrt": _in_float32(lambda x: np.ones((), x.dtype) / np.sqrt(x)),
    "logistic": _in_float32(lambda x: np.ones((), x.dtype) / (np.ones((), x.dtype) + np.exp(-x))),
    "abs": _always(np.abs),
    "neg": _always(np.negative),
    "is_finite": _always(np.isfinite),
    "not": _always(np.invert),
    "add": _always(np.add),
    "add_any": _always(np.add),
    "sub": _always(np.subtract),
    "mul": _always(np.multiply),
    "div": _always(_quotient),
    "rem": _always(np.fmod),
    "max": _always(np.maximum),
    "min": _always(np.minimum),
    "pow": _always(lambda x, y: np.power(x, y).astype(x.dtype)),
    "integer_pow": _integer_pow,
    "and": _always(np.bitwise_and),
    "or": _always(np.bitwise_or),
    "xor": _always(np.bitwise_xor),
    "shift_left": _shift(np.left_shift, np.zeros_like),
    "shift_right_arithmetic": _shift(np.right_shift, lambda x: np.where(x < 0, -1, 0)),
    "shift_right_logical": _shift(_shift_right_logical, np.zeros_like),
    "eq": _always(np.equal),
    "ne": _always(np.not_equal),
    "ge": _always(np.greater_equal),
    "gt": _always(np.greater),
    "le": _always(np.less_equal),
    "lt": _always(np.less),
    "select_n": _always(_select),
    "clamp": _always(_clamp),
    "convert_element_type": _convert,
    "bitcast_convert_type": _bitcast,
    "bitcast": _bitcast_rows,
    "multiple_of": _multiple_of,
    "remove_memory_space": _always(lambda x: x),
    "broadcast_in_dim": _broadcast_in_dim,
    "iota": _iota,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _always(_dynamic_update_slice),
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "pad": _pad,
    "gather": _gather,
    "roll": _roll,
    "reduce_sum": _reduction(np.sum),
    "reduce_prod": _reduction(np.prod),
    "reduce_max": _reduction(np.max),
    "reduce_min": _reduction(np.min),
    "reduce_and": _reduction(np.all),
    "reduce_or": _reduction(np.any),
    "argmax": _argument(np.argmax),
    "argmin": _argument(np.argmin),
    "cumsum": _cumulative(np.add),
    "cumprod": _cumulative(np.multiply),
    "cummax": _cumulative(np.maximum),
    "cummin": _cumulative(np.minimum),
    "dot_general": _dot_general,
    "copy": _always(lambda x: x),
    "optimization_barrier": _always(lambda *xs: xs),
}


@functools.cache
def _jitted(primitive, parameters):
    return jax.jit(lambda *operands: primitive.bind(*operands, **primitive.get_bind_params(dict(parameters))))


def compiled(equation):
    """For every other primitive: the function that JAX makes of it."""
    program = _jitted(equation.primitive, tuple(sorted(equation.params.items())))

    def as_numpy(x):
        return x if jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended) else np.asarray(x)  # keys of random numbers

    return lambda *operands: jax.tree.map(as_numpy, program(*operands))
