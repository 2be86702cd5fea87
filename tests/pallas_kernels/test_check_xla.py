"""`pallas_kernels.check.xla`: cycles by XLA's own estimates, and the multiply-accumulates of a program's products."""

import jax
import jax.numpy as jnp
from pallas_kernels.check import xla

PROGRAM = """\
HloModule jit_run, is_scheduled=true

%mild (a.1: f32[8]) -> f32[8] {
  ROOT %copy.1 = f32[8]{0} copy(%a.1), backend_config={"window_config":{"estimated_cycles":"30"}}
}

%wild (a.2: f32[8]) -> f32[8] {
  ROOT %copy.2 = f32[8]{0} copy(%a.2), backend_config={"window_config":{"estimated_cycles":"500"}}
}

%inner.body (b: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"7","is_mask":false}
}

%inner.end (b: (s32[], f32[8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(4)
  ROOT %compare.1 = pred[]{:T(512)} compare(%i, %constant.1), direction=LT
}

%body (c: (s32[], f32[8])) -> (s32[], f32[8]) {
  %while.1 = (s32[], f32[8]{0}) while(%t), condition=%inner.end, body=%inner.body
  %cond.1 = f32[8]{0} conditional(%p, %a, %b), true_computation=%mild, false_computation=%wild
  %cond.2 = f32[8]{0} conditional(%n, %a, %b), branch_computations={%wild, %mild}
}

%end (c: (s32[], f32[8])) -> pred[] {
  %constant.2 = s32[]{:T(128)} constant(10)
  ROOT %compare.2 = pred[]{:T(512)} compare(%i, %constant.2), direction=LT
}

ENTRY %main.3 (p: f32[8]) -> f32[8] {
  %copy.3 = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"1000"}
  %kernel.1 = f32[8]{0} custom-call(%p), custom_call_target="tpu_custom_call"
  %while.2 = (s32[], f32[8]{0}) while(%t), condition=%end, body=%body
}
"""


def test_cycles_count_loops_as_often_as_they_turn_and_the_cheapest_branch():
    assert xla.cycles(PROGRAM) == 1000 + 10 * (4 * 7 + 30 + 30)


def test_cycles_are_unknown_where_the_end_of_a_loop_cannot_be_read():
    assert xla.cycles(PROGRAM.replace("constant(4)", "parameter(0)")) is None


def test_products_count_loops_and_the_cheapest_branch():
    def run(x, y):
        def step(carry, _):
            carry = jax.lax.cond(carry[0, 0] > 0, lambda c: c @ y @ y, lambda c: c @ y, carry)
            return carry, None

        return jax.lax.scan(step, jnp.einsum("bij,bjk->ik", x, x), length=5)[0]

    x, y = jnp.ones((2, 8, 8)), jnp.ones((8, 8))
    assert xla.products(jax.jit(run), x, y) == 2 * 8**3 + 5 * 8**3
