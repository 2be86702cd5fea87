"""The forms in plain JAX, held to the suites that the kernels are held to.

Compiled, which takes up to 5 s each: a case of every kind of decay, with documents and without, and of extreme gates.
Other lengths and widths of these are evaluated."""

from conformance_suite import conformance_tests
from pallas_kernels.delta_rule import conformance as delta_rule
from pallas_kernels.linear_attention import conformance as linear_attention
from pallas_kernels.selective_scan import conformance as selective_scan


class TestLinearAttention(conformance_tests(linear_attention.SUITE)):
    implementation = "chunked"
    run_by_program = frozenset({
        "one token, padded", "ragged, head", "no decay", "packed", "groups, packed", "extreme gates", "token, bonus",
        "channel", "channel, packed", "channel, bonus", "channel, extreme gates",
    })  # fmt: skip
    run_twice = frozenset()


class TestDeltaRule(conformance_tests(delta_rule.SUITE)):
    implementation = "chunked"
    run_by_program = frozenset({
        "one token, padded", "packed", "packed, no decay", "extreme gates", "vector, packed", "vector, extreme gates",
    })  # fmt: skip
    run_twice = frozenset()


class TestSelectiveScan(conformance_tests(selective_scan.SUITE)):
    implementation = "chunked"
    run_twice = frozenset()
