"""How the TPU's kernels of the selective scan lay a chunk of tokens out in fast memory.

A register holds 1,024 channels of one token, `[8, 128]`: the states of a token are N such registers, its output is
their weighted sum, and nothing is ever summed across a register but for the gradients of B and C. What differs:

- x, dt and y lie in memory with tokens along the lines (sublanes) of a register. They go through a small buffer that is
  written with one stride and read with another, which is the transposition.
- B and C are numbers per token and state: `spread` writes them along all lanes once for a chunk, and a load then
  repeats the line that it reads.
- What becomes of a token follows from its mark, spread likewise: padding has a step of 0, and the first token of a
  document one that decays everything to 0.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels import devices

LANES = 128
LINES = 8  # of a register
TILE = LINES * LANES  # channels of a register
TOKENS = 16  # taken together: the lines of a register of bfloat16
CHUNK = 128  # tokens between two saved states
TOGETHER = 4  # registers of states that are carried over tokens: with more, the compiler runs out of registers
STATES = 16  # in the body of a loop
WIDEST = 4096  # channels of a step of the grid, with few states
VMEM_LIMIT = 54 * 2**20  # bytes; the smallest fast memory among the generations aimed at holds 64 MiB
PADDING, REAL, START = 0.0, 1.0, 2.0  # marks
# A step that decays everything: times any decay rate, which is kept above the least, it is below the exponents of
# float32 (and times the derivative 0 it is 0, as infinity is not). A rate of 1e-30 decays nothing for steps up to 1e22.
FOREVER, LEAST_RATE = 3e38, 1e-30


@dataclasses.dataclass(frozen=True)
class Layout:
    """length: T. width: D. part: channels that one step of the grid takes. marked: whether tokens have marks."""

    length: int
    width: int
    states: int
    part: int
    marked: bool

    @property
    def parts(self) -> int:
        return pl.cdiv(self.width, self.part)

    @property
    def chunks(self) -> int:
        return pl.cdiv(self.length, CHUNK)

    @property
    def wide(self) -> int:
        """Registers of channels that the forward takes together."""
        return 2 if self.part % (2 * TILE) == 0 else 1

    def together(self, wide: int) -> int:
        """States that are taken together, of so many registers of channels."""
        return min(self.states, TOGETHER // wide)

    @property
    def state_groups(self) -> int:
        """How often the loop over states runs, with at most STATES each time."""
        return pl.cdiv(self.states, STATES)

    def token_groups(self, chunk):
        """How many groups of tokens a chunk has: the last one may be short."""
        if self.length % CHUNK == 0:
            return CHUNK // TOKENS
        return jnp.minimum(CHUNK // TOKENS, pl.cdiv(self.length - chunk * CHUNK, TOKENS))


def layout(length: int, width: int, states: int, batch: int, itemsize: int, marked: bool) -> Layout:
    """The widest parts that fit, so that B and C are spread seldom; two at least for the two cores of some chips.

    itemsize: bytes of an element of x, or of the gate.
    """
    most = WIDEST // 4 if states > 64 else WIDEST // 2 if states > 16 or itemsize > 2 else WIDEST
    two_cores = devices.current().kind in ("TPU v4", "TPU v5", "TPU v5p") and batch == 1
    parts = max(pl.cdiv(width, most), 2 if two_cores and width > TILE else 1)
    unit = TILE if min(width, most) <= TILE else 2 * TILE
    part = unit * pl.cdiv(pl.cdiv(width, parts), unit)
    return Layout(length, width, states, part, marked or length % TOKENS != 0)


def unrolled(count: int, body, carry):
    """carry = body(i, carry) for i = 0 .. count - 1, without a loop, which a simulator would take long to compile."""
    if devices.current().interpreted:
        return jax.lax.fori_loop(0, count, body, carry)
    for i in range(count):
        carry = body(i, carry)
    return carry


def in_order(count: int, ahead: int, load, body, carry):
    """carry = body(i, load(i), carry) for i = 0 .. count - 1, unrolled, where load(i) stands before body(i - ahead).

    A v6e's compiler starts on tokens far ahead, more of them than it has registers for. It does not where the loads are
    from what the body stores to at a place that it cannot tell from theirs, such as another of a loop's counters.
    """
    if devices.current().interpreted:
        return jax.lax.fori_loop(0, count, lambda i, carry: body(i, load(i), carry), carry)
    loaded = [load(i) for i in range(ahead)]
    for i in range(count):
        if i + ahead < count:
            loaded.append(load(i + ahead))
        carry = body(i, loaded[i], carry)
    return carry


def spread(source, target):
    """source `[N, CHUNK]` to target `[N, CHUNK, 128]`, alike in all lanes."""
    columns = source[...].T
    for n in range(target.shape[0]):
        target[n] = jnp.broadcast_to(columns[:, n : n + 1], target.shape[1:])


class Rows:
    """A group of tokens of the blocks `[CHUNK, part]` of x and dt, 128 channels at a time, tokens along the lines.

    row: its first token in the chunk. at: the first channel in the part, of 1,024. marks: `[CHUNK, 128]` or None.
    """

    def __init__(self, layout: Layout, row, at, marks):
        self.layout, self.row, self.at = layout, row, at
        self.mark = None if marks is None else marks[pl.ds(row, TOKENS), :]

    def lanes(self, k):
        return pl.ds(pl.multiple_of(self.at + LANES * k, LANES), LANES)

    def read(self, block, k):
        """float32 `[TOKENS, 128]`, as it lies there."""
        return block[pl.ds(self.row, TOKENS), self.lanes(k)].astype(jnp.float32)

    def write(self, block, k, value):
        block[pl.ds(self.row, TOKENS), self.lanes(k)] = value.astype(block.dtype)

    def real(self, value, k):
        """0 for padding, and for channels that do not exist."""
        if self.mark is not None:
            value = jnp.where(self.mark > PADDING, value, 0)
        if self.layout.width % self.layout.part:
            first = pl.program_id(1) * self.layout.part + self.at + LANES * k
            channel = first + jax.lax.broadcasted_iota(jnp.int32, value.shape, 1)
            value = jnp.where(channel < self.layout.width, value, 0)
        return value

    def step(self, dt, k):
        """The step size whose decay is that of the token."""
        step = self.real(dt, k)
        return step if self.mark is None else jnp.where(self.mark == START, FOREVER, step)


# What is kept of tokens lies in `[., tokens / 8, 64, 128]`, 8 tokens x 1,024 channels in each group: line 8 t + k is
# token t's k-th 128 channels, so that 8 lines are a register of a token, and every eighth line one of 128 channels.
GROUPS = TOKENS // LINES  # of tokens taken together


def put_rows(buffer, group, k, value):
    """value `[TOKENS, 128]`: the k-th channels of the tokens of the groups from `group` on."""
    for i in range(GROUPS):
        buffer[k // LINES, group + i, pl.ds(k % LINES, LINES, stride=LINES), :] = value[LINES * i : LINES * (i + 1)]


def take_rows(buffer, group, k):
    lines = pl.ds(k % LINES, LINES, stride=LINES)
    return jnp.concatenate([buffer[k // LINES, group + i, lines, :] for i in range(GROUPS)], axis=0)


def token(group, t):
    """The last three indices of the t-th of the tokens from a group on: of `[8, 128]`."""
    return group + t // LINES, pl.ds(t % LINES * LINES, LINES), slice(None)


def weight(spread, states, t):
    """The weights of some states for token t, `[states, 1, 128]`."""
    return spread[states, pl.ds(t, 1), :]
