"""The laws of the interface, for every entry of `MIXERS` and for options that change what a mixer computes.

All laws compare on one set of inputs: rows with documents, padding (with garbage in it), and a state that has
already read something. Nearly all their time is compiling: a mixer's programs are few, shared by the laws (of two
lengths alone, the whole and a single token), and what the tests compute themselves is NumPy.
"""

import functools
import re

import jax
import jax.numpy as jnp
import lcr
import numpy as np
import pytest
from compiling import OPTIMIZED
from flax import nnx
from lcr.layers import compressive_memory
from pallas_kernels.delta_rule import api as delta_rule_api
from pallas_kernels.delta_rule import chunked as delta_rule_chunked
from pallas_kernels.linear_attention import api as linear_attention_api
from pallas_kernels.linear_attention import chunked as linear_attention_chunked
from pallas_kernels.linear_attention import vector_decay
from pallas_kernels.selective_scan import chunked as selective_scan_chunked
from pallas_kernels.wkv import api as wkv_api
from pallas_kernels.wkv import chunked as wkv_chunked
from pallas_kernels.tolerances import assert_close

BATCH, LENGTH, WIDTH = 3, 24, 32
# More than a call's tokens, which so overwrite part of a cache; fewer than these and those that a state has read
# before, so that caches overflow in row 2 and become windows.
CAPACITY = 28

# Every entry, with options where its defaults would test less: twenty-four tokens fit into one segment of "infini", and
# the four of attention are one module with the same defaults but for the number of key-value heads. Two of these have
# the same options, and so programs that a run's cache holds already. (No positions at all: Jamba's checkpoint.)
CASES = {name: (name, {}) for name in lcr.MIXERS} | {
    "attention": ("attention", {"window": 5, "qk_norm": True, "soft_cap": 2.0}),
    "mha": ("mha", {"window": 5, "qk_norm": True, "soft_cap": 2.0}),
    "mqa": ("mqa", {"positions": "alibi"}),
    "gqa": ("gqa", {"positions": "xpos", "num_heads": 4, "num_kv_heads": 2}),
    "infini": ("infini", {"segment_length": 5, "update": "delta"}),
}

# Rows of documents: padding on the left, in the middle, on the right; an id that comes back; one long document.
IDS = np.array(
    [
        [0, 0, 3, 3, 3, 3, 0, 0, 3, 3, 3, 5, 5, 5, 5, 5, 5, 0, 5, 5, 5, 5, 5, 5],
        [1, 1, 1, 1, 1, 2, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 7, 7, 7, 7, 7, 0, 0, 0],
        [4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4],
    ],
    np.int32,
)
# Into single tokens, into thirds, and into both.
CUTS = [tuple(range(1, LENGTH)), (8, 16), (8, *range(9, 16), 16)]


class Built:
    """A mixer with its parameters, and what the laws ask of it, compiled once per length; in and out go NumPy arrays."""

    def __init__(self, case, dtype, implementation, width):
        self.dtype = jnp.dtype(dtype)
        options = {"dtype": self.dtype} | ({} if implementation is None else {"implementation": implementation})
        self.mixer = nnx.eval_shape(lambda: make(case, width, **options))
        self.graph, _ = nnx.split(self.mixer)
        self.parameters = parameters_of(case, width)
        self._call = jax.jit(self.apply)
        self._pull = jax.jit(self.pull)
        self._mapped = jax.jit(jax.vmap(jax.grad(self.remat_loss, argnums=1, has_aux=True), in_axes=(None, 0, 0, 0)))

    def apply(self, parameters, x, state, ids):
        """state: of an earlier call, None, or a function that makes one."""
        mixer = nnx.merge(self.graph, parameters)
        # as a later layer: in the first one a value residual changes nothing
        more = (jnp.flip(x, axis=-1),) if hasattr(mixer, "values") else ()
        return mixer(x, state() if callable(state) else state, ids, *more)

    def init_state(self, capacity=CAPACITY, batch=BATCH):
        return jax.device_get(self.mixer.init_state(batch, capacity))

    def call(self, x, state, ids):
        """The outputs; with ids by the program that also gives gradients, which the laws need anyway."""
        if ids is None:
            return jax.device_get(self._call(self.parameters, x, state, ids))
        return self.pull_back(x, state, ids, (np.zeros(x.shape, self.dtype), no_cotangent(state)))[0]

    def pull(self, parameters, x, state, ids, cotangents):
        outputs, pull = jax.vjp(functools.partial(self.apply, ids=ids), parameters, x, state)
        return outputs, pull(cotangents)

    def pull_back(self, x, state, ids, cotangents):
        """The outputs, and the gradients for the parameters, x and the state."""
        return jax.device_get(self._pull(self.parameters, x, state, ids, cotangents))

    def remat_loss(self, parameters, x, state, weights):
        y, after = jax.checkpoint(self.apply)(parameters, x, state, None)
        return jnp.sum(y * weights), (y, after)

    def mapped(self, x, state, weights):
        """Without ids, row by row under vmap, all computed again for the gradient: the outputs, and the gradient of
        sum(y * weights) for x."""
        rows = jax.tree.map(lambda leaf: leaf[:, None], (x, state, weights))
        of_x, outputs = jax.device_get(self._mapped(self.parameters, *rows))
        return jax.tree.map(lambda leaf: leaf[:, 0], (outputs, of_x))

    def pieces(self, x, state, ids, cuts):
        """Feeds x, cut at `cuts`, through the state."""
        outputs = []
        for start, *part in self.parts(cuts, x, ids):
            y, state = self.call(part[0], state, part[1])
            outputs.append(y[:, start])
        return np.concatenate(outputs, axis=1), state

    def parts(self, cuts, x, ids, *others):
        """Where a piece lies in its call; and the call's x, ids and others: a token alone; of a longer piece the whole
        with all the rest as padding, so that no program is compiled for it."""
        for a, b in zip((0, *cuts), (*cuts, LENGTH), strict=True):
            if b - a == 1:
                yield slice(None), *(array[:, a:b] for array in (x, ids, *others))
            else:
                yield slice(a, b), x, np.where((np.arange(LENGTH) >= a) & (np.arange(LENGTH) < b), ids, 0), *others

    def gradients(self, x, state, ids, weights, cuts=()):
        """Gradients of sum(y * weights) + sum(sin(final state)) for the parameters, x and the initial state."""
        parts = list(self.parts(cuts, x, ids, weights))
        states = [state]
        for _, part, part_ids, _ in parts:
            states.append(self.call(part, states[-1], part_ids)[1])
        cotangent = jax.tree.map(lambda leaf: np.cos(leaf) if is_float(leaf) else no_gradient(leaf), states[-1])
        parameters, xs = [], []
        for (at, part, part_ids, part_weights), before in zip(parts[::-1], states[-2::-1], strict=True):
            args = (part, before, part_ids, (part_weights.astype(part.dtype), cotangent))
            _, (of_parameters, of_x, cotangent) = self.pull_back(*args)
            parameters.append(of_parameters)
            xs.insert(0, of_x[:, at])
        return {
            "parameters": jax.tree.map(lambda *leaves: sum(leaves), *parameters),
            "x": np.concatenate(xs, axis=1),
            "state": [leaf for leaf in jax.tree.leaves(cotangent) if is_float(leaf)],
        }


def is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def no_gradient(leaf):
    return np.zeros(leaf.shape, jax.dtypes.float0)


def make(case, width, **options):
    name, of_case = CASES[case]
    return lcr.make_mixer(name, width, rngs=nnx.Rngs(0), **of_case, **options)


@functools.cache
def parameters_of(case, width):
    """Away from the special values (zeros, ones) that initialisers give."""
    leaves, tree = jax.tree.flatten(nnx.split(make(case, width))[1])
    rng = np.random.default_rng(1)
    leaves = [jnp.asarray(np.asarray(leaf) + 0.1 * rng.standard_normal(leaf.shape, np.float32)) for leaf in leaves]
    return jax.tree.unflatten(tree, leaves)


@functools.cache
def build(case, dtype="float32", implementation=None, width=WIDTH) -> Built:
    return Built(case, dtype, implementation, width)


@functools.cache
def inputs(seed=2, length=LENGTH, width=WIDTH):
    values = np.random.default_rng(seed).standard_normal((BATCH, length, width), np.float32)
    values.flags.writeable = False
    return values


def used_state(built):
    """A state that has read eight tokens of documents 3, 9 and 4: rows 0 and 2 of IDS go on with theirs."""
    ids = np.where(np.arange(LENGTH) < 8, np.array([[3], [9], [4]], np.int32), 0)
    return built.call(inputs(3), built.init_state(), ids)[1]


def no_cotangent(state):
    return jax.tree.map(lambda leaf: np.zeros_like(leaf) if is_float(leaf) else no_gradient(leaf), state)


@pytest.fixture(scope="module", autouse=True)
def short_chunks():
    """Chunks of eight tokens, so that calls of twenty-four have boundaries between chunks; and where the default at
    these sizes is a token loop, the chunked form that larger ones get."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selective_scan_chunked, "CHUNK_LENGTH", 8)
        patch.setattr(linear_attention_chunked, "CHUNK", 8)
        patch.setattr(vector_decay, "CHUNK", 8)
        patch.setattr(vector_decay, "BLOCK", 4)
        patch.setattr(delta_rule_chunked, "CHUNK", 8)
        patch.setattr(compressive_memory, "CHUNK", 8)
        patch.setattr(wkv_chunked, "CHUNK", 4)
        patch.setattr(wkv_chunked, "ROW_ELEMENTS", 2 * BATCH * WIDTH)  # two chunks at a time
        for api in (linear_attention_api, delta_rule_api, wkv_api):
            patch.setattr(api, "preferred", lambda *call: ("chunked",))
        yield


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.replace(", ", "-").replace(" ", "_"))
def case(request):
    """All laws of one case are tested before the next, so that its programs need not be kept."""
    yield request.param
    build.cache_clear()
    parameters_of.cache_clear()
    jax.clear_caches()


def test_split(case):
    built = build(case)
    x, state, weights = inputs(), used_state(built), inputs(4)
    whole = built.call(x, state, IDS)
    for cuts in CUTS:
        assert_close(built.pieces(x, state, IDS, cuts), whole, "float32", f"cut at {cuts}")
    gradients = built.gradients(x, state, IDS, weights)
    for cuts in CUTS:
        through_the_state = built.gradients(x, state, IDS, weights, cuts)
        assert_close(through_the_state, gradients, "float32 gradient", f"cut at {cuts}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.abs(leaf).max() > 0, f"{jax.tree_util.keystr(path)}: zero everywhere, so it tests nothing"


def test_no_segment_ids(case):
    """`segment_ids=None` equals the ids of the document in hand, for many tokens (by the program of the transforms) and
    for one."""
    built = build(case)
    x, state = inputs(), used_state(built)
    ids = np.broadcast_to(state.segment_id[:, None], (BATCH, LENGTH))
    outputs, _ = built.mapped(x, state, inputs(4))
    assert_close(outputs, built.call(x, state, ids), "float32")
    assert_close(built.call(x[:, :1], state, None), built.call(x[:, :1], state, ids[:, :1]), "float32")


def test_no_state(case):
    """`state=None` equals a fresh state with room for the call's tokens, in which the first document has the id 1:
    outputs and, as training has it, gradients, with documents and without."""
    built = build(case)
    x, fresh = inputs(), built.init_state()

    def traced(state, ids):
        """The program as text, but for the addresses of the functions that make its gradients."""
        return re.sub(r"0x\w+", "", str(jax.make_jaxpr(built.apply, static_argnums=2)(built.parameters, x, state, ids)))

    def makes_one():
        return built.mixer.init_state(BATCH, LENGTH)

    one = np.ones((BATCH, 1), np.int32)
    assert_close(built.call(x[:, :1], fresh, None), built.call(x[:, :1], fresh, one), "float32", "the first id is 1")
    if all(traced(None, ids) == traced(makes_one, ids) for ids in (IDS, None)):
        return  # nothing else to compare: one program

    def room_for_the_call(state):
        """Without the slots that are left empty by a call of fewer tokens than a cache has slots."""
        return jax.tree.map(lambda leaf, like: leaf[tuple(map(slice, like.shape))], state, makes_one())

    y, after = built.call(x, fresh, np.ones((BATCH, LENGTH), np.int32))
    assert_close(built.call(x, None, None), (y, room_for_the_call(after)), "float32")
    weights = inputs(4)
    (y, after), (*expected, _) = built.pull_back(x, fresh, IDS, (weights, no_cotangent(fresh)))
    outputs, (*gradients, _) = built.pull_back(x, None, IDS, (weights, no_cotangent(makes_one())))
    assert_close(outputs, (y, room_for_the_call(after)), "float32")
    assert_close(gradients, expected, "float32 gradient")


@pytest.mark.parametrize("end", [1, 13, 23])
def test_causality(case, end):
    built = build(case)
    x, state = inputs(), used_state(built)
    early = np.arange(LENGTH)[None, :, None] < end
    y, _ = built.call(x, state, IDS)
    y_changed, _ = built.call(np.where(early, x, 100 * inputs(5)), state, IDS)
    assert_close(y_changed[:, :end], y[:, :end], "float32")
    weights = np.where(early, inputs(4), np.float32(0))
    _, (_, of_x, _) = built.pull_back(x, state, IDS, (weights, no_cotangent(state)))
    assert of_x[:, :end].any()
    assert not of_x[:, end:].any(), "a gradient flows to a later token"


def documents(ids):
    """The documents of one row of ids, each as the list of its tokens."""
    real = [t for t in range(len(ids)) if ids[t]]
    groups = [[real[0]]]
    for before, t in zip(real, real[1:], strict=False):
        if ids[t] != ids[before]:
            groups.append([])
        groups[-1].append(t)
    return groups


@pytest.mark.parametrize("b", [0, 1])
def test_packing(case, b):
    """Each document of a row gives alone, on a fresh state, what it gives packed: outputs and gradients."""
    built = build(case)
    x, weights = inputs(), inputs(4)
    state = built.init_state()
    nothing = no_cotangent(state)
    groups = documents(IDS[b])
    only = np.zeros_like(weights)
    only[b] = np.where(IDS[b][:, None] != 0, weights[b], 0)
    (y, _), (*packed, _) = built.pull_back(x, state, IDS, (only, nothing))

    total, of_x = jax.tree.map(np.zeros_like, built.parameters), np.zeros_like(x)
    for at in groups:  # alone at the start of row 0, the rest of the batch padding
        end = len(at)
        own_x, own_ids, own_weights = inputs(10).copy(), np.zeros_like(IDS), np.zeros_like(weights)
        own_x[0, :end], own_ids[0, :end], own_weights[0, :end] = x[b, at], 1, weights[b, at]
        (own_y, _), (of_parameters, of_own_x, _) = built.pull_back(own_x, state, own_ids, (own_weights, nothing))
        assert_close(own_y[0, :end], y[b, at], "float32")
        total = jax.tree.map(np.add, total, of_parameters)
        of_x[b, at] = of_own_x[0, :end]
    assert_close([total, of_x], packed, "float32 gradient")


@pytest.mark.parametrize("where", ["left", "right", "middle"])
def test_padding(case, where):
    """Padding, with garbage in it, changes no output, no state, no gradient; its own output is zero."""
    built = build(case)
    state = used_state(built)
    at = np.array({
        "left": list(range(8, LENGTH)),
        "right": list(range(LENGTH - 8)),
        "middle": [0, 1, 2, 3, 5, 6, 9, 10, 11, 12, 15, 16, 17, 18, 19, 23],
    }[where])  # fmt: skip
    padding = np.setdiff1d(np.arange(LENGTH), at)
    # Sixteen real tokens: without padding one by one, with padding as one call of twenty-four.
    x, weights = inputs()[:, :16], inputs(4)[:, :16]
    ids = np.array([[3] * 8 + [5] * 8, [9] * 16, [4] * 2 + [6] * 14], np.int32)
    outputs, after = [], state
    for t in range(16):
        y, after = built.call(x[:, t : t + 1], after, ids[:, t : t + 1])
        outputs.append(y)

    def padded(values, garbage):
        result = garbage.copy()
        result[:, at] = values
        return result

    padded_x, padded_ids = padded(x, 1e3 * inputs(6)), padded(ids, np.zeros_like(IDS))
    y_padded, after_padded = built.call(padded_x, state, padded_ids)
    assert_close(y_padded[:, at], np.concatenate(outputs, axis=1), "float32")
    assert_close(after_padded, after, "float32")
    assert not y_padded[:, padding].any()

    gradients = built.gradients(padded_x, state, padded_ids, padded(weights, inputs(7)))
    assert not gradients["x"][:, padding].any()
    assert gradients["x"][:, at].any()
    for garbage in (0.0, -1.0):  # neither the garbage nor the cotangent of a padded output matters
        other = padded(x, np.float32(garbage) * padded_x)
        again = built.gradients(other, state, padded_ids, padded(weights, 3 * inputs(8)))
        assert_close(again, gradients, "float32 gradient")


def test_a_call_of_padding_alone_changes_nothing(case):
    built = build(case)
    state = used_state(built)
    y, after = built.call(inputs(), state, np.zeros_like(IDS))
    assert not y.any()
    assert_close(after, state, "exact")


def test_batch(case):
    """A row gives the same beside other neighbours, and in another place of the batch."""
    built = build(case)
    x, state = inputs(), used_state(built)
    y, after = built.call(x, state, IDS)
    for b in range(BATCH):
        order = np.array([(b + 1) % BATCH, b, b])  # row b in two places, beside another row
        others = 50 * inputs(11)
        others[1] = x[b]
        ids = np.stack([IDS[(b + 2) % BATCH], IDS[b], np.zeros_like(IDS[b])])
        y_beside, after_beside = built.call(others, jax.tree.map(lambda leaf: leaf[order], state), ids)
        row = [jax.tree.map(lambda leaf, i=i: leaf[i], tree) for tree, i in (
            (y_beside, 1), (y, b), (after_beside, 1), (after, b))]  # fmt: skip
        assert_close(row[0::2], row[1::2], "float32", f"row {b}")


def test_reference(case):
    """The fast form equals the slow one: outputs, states, and all gradients, state cotangents included."""
    fast, slow = build(case), build(case, implementation="reference")
    x, state = inputs(), used_state(fast)
    cotangents = (inputs(4), jax.tree.map(lambda leaf: np.cos(leaf) if is_float(leaf) else no_gradient(leaf), state))
    (outputs, gradients), (expected, slow_gradients) = [
        built.pull_back(x, state, IDS, cotangents) for built in (fast, slow)
    ]
    assert_close(outputs, expected, "float32")
    assert_close(gradients[:2], slow_gradients[:2], "float32 gradient")
    assert_close(*([leaf for leaf in jax.tree.leaves(g[2]) if is_float(leaf)] for g in (gradients, slow_gradients)), "float32 gradient")


def test_precision(case):
    """bfloat16 compute stays near float32, cut into pieces too; outputs are bfloat16, recurrent accumulators are not."""
    exact, rounded = build(case), build(case, "bfloat16")
    x, weights = inputs().astype(jnp.bfloat16), inputs(4).astype(jnp.bfloat16)
    state, state_rounded = exact.init_state(), rounded.init_state()
    (y, after), (of_parameters, *_) = exact.pull_back(
        x.astype(np.float32), state, IDS, (weights.astype(np.float32), no_cotangent(state))
    )
    (y_rounded, after_rounded), (of_parameters_rounded, *_) = rounded.pull_back(
        x, state_rounded, IDS, (weights, no_cotangent(state_rounded))
    )
    assert y_rounded.dtype == jnp.bfloat16
    assert_close(y_rounded, y, "bfloat16")
    assert_close(after_rounded, after, "bfloat16")
    dtypes = [jax.tree.map(lambda leaf: leaf.dtype, tree) for tree in (state_rounded, after_rounded)]
    assert dtypes[0] == dtypes[1], "a call changes the state's dtypes"
    if constant_size(rounded.mixer):
        held = jax.tree_util.tree_leaves_with_path(state_rounded)  # activations, not accumulators
        held = [leaf for path, leaf in held if not jax.tree_util.keystr(path).endswith((".keys", ".values", ".conv"))]
        largest = max(held, key=lambda leaf: leaf.size)
        assert largest.dtype == np.float32, "a recurrent accumulator is float32"
    assert_close(of_parameters_rounded, of_parameters, "bfloat16 gradient")

    outputs, through = rounded.pieces(x, state_rounded, IDS, (8, 16))  # by the same program: see the table
    assert_close(outputs, y_rounded, "bfloat16")
    assert_close(through, after_rounded, "bfloat16 cut" if constant_size(rounded.mixer) else "bfloat16")


def test_bfloat16(case):
    """The laws of causality, packing, padding and batch with activations in bfloat16, by the program of the law above;
    where nothing else is computed, bit for bit."""
    built = build(case, "bfloat16")

    def inputs_of(seed):
        return inputs(seed).astype(jnp.bfloat16)

    x, other, state = inputs_of(2), 100 * inputs_of(5), built.init_state()
    y, after = built.call(x, state, IDS)
    assert y.dtype == jnp.bfloat16

    early = np.arange(LENGTH)[None, :, None] < 13
    y_changed, _ = built.call(np.where(early, x, other), state, IDS)
    assert_close(y_changed[:, :13], y[:, :13], "exact", "causality")

    real = (IDS != 0)[:, :, None]
    y_garbage, after_garbage = built.call(np.where(real, x, other), state, IDS)
    assert_close((y_garbage, after_garbage), (y, after), "exact", "what stands in padding")
    assert not np.asarray(y)[~np.broadcast_to(real, y.shape)].any()
    y_padding, unchanged = built.call(other, after, np.zeros_like(IDS))
    assert not y_padding.any()
    assert_close(unchanged, after, "exact", "padding alone")

    neighbours = other.copy()
    neighbours[1] = x[1]
    assert_close(built.call(neighbours, state, IDS)[0][1], y[1], "bfloat16", "batch")

    for at in documents(IDS[1]):
        own_x, own_ids = other.copy(), np.zeros_like(IDS)
        own_x[0, : len(at)], own_ids[0, : len(at)] = x[1, at], 1
        assert_close(built.call(own_x, state, own_ids)[0][0, : len(at)], y[1, at], "bfloat16", "packing")


def constant_size(mixer):
    return lcr.state_bytes(mixer.init_state(1, 1)) == lcr.state_bytes(mixer.init_state(1, 99))


def test_a_million_tokens_with_extreme_gates(case):
    """Inputs that drive every gate to its ends, then smaller ones, neither overflow nor vanish into NaN at a million
    tokens. A cache accumulates nothing over them but its position, so that is set on in the middle."""
    piece, width = 4096, WIDTH // 2
    built = build(case, width=width)
    count, skipped = (258, 0) if constant_size(built.mixer) else (6, 252 * piece)
    scales = np.repeat(np.array([30.0, 1.0, 0.01], np.float32), count // 3)
    x = inputs(8, piece, width)[:1]

    def step(state, scale):
        y, state = built.apply(built.parameters, scale * x, state, None)
        return state, jnp.abs(y).max()

    @functools.partial(jax.jit, compiler_options=None if skipped else OPTIMIZED)  # a million do run long
    def run(state):
        return jax.lax.scan(step, state, scales)

    read = 0
    state = built.init_state(16, batch=1)
    for skip in (0, skipped) if skipped else (0,):
        state, largest = jax.device_get(run(state.replace(position=state.position + np.int32(skip))))
        read += skip + piece * count
        assert np.isfinite(largest).all() and largest.min() > 0
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert (state.position == read).all() and read > 1_000_000


def test_transforms(case):
    """vmap and remat give what a plain call gives (without ids: with them they are traced); tracing does not unroll
    time. (Under scan runs the law above.)"""
    built = build(case)
    x, state, weights = inputs(), used_state(built), inputs(4)
    ids = np.broadcast_to(state.segment_id[:, None], (BATCH, LENGTH))
    _, mapped = built.mapped(x, state, weights)
    _, (_, of_x, _) = built.pull_back(x, state, ids, (weights, no_cotangent(state)))
    assert_close(mapped, of_x, "float32 gradient", "vmap of a gradient, remat")

    rows = jax.tree.map(lambda leaf: leaf[:, None], (x, state, IDS))
    jax.eval_shape(jax.vmap(functools.partial(built.apply, built.parameters)), *rows)

    def size(length):
        return str(jax.make_jaxpr(built.apply)(built.parameters, inputs(9, length), state, None)).count(" = ")

    assert size(4096) <= size(2048), "the traced program grows with the number of tokens"


def test_cost(case):
    """A state keeps its shapes whatever it has read; a cache grows linearly with its capacity, others not."""
    built = build(case)
    state = built.init_state()
    _, after = built.call(inputs(), state, IDS)
    shapes = [jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (state, after)]
    assert shapes[0] == shapes[1]
    held = [lcr.state_bytes(built.mixer.init_state(1, capacity)) for capacity in (1000, 2000, 4000)]
    assert held[2] - held[1] == 2 * (held[1] - held[0])
