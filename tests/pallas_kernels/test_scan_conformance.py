"""The forms in plain JAX, held to the suites that the kernels are held to."""

from conformance_suite import conformance_tests
from pallas_kernels.delta_rule import conformance as delta_rule
from pallas_kernels.linear_attention import conformance as linear_attention
from pallas_kernels.selective_scan import conformance as selective_scan


class TestLinearAttention(conformance_tests(linear_attention.SUITE)):
    implementation = "chunked"
    run_twice = frozenset()


class TestDeltaRule(conformance_tests(delta_rule.SUITE)):
    implementation = "chunked"
    run_twice = frozenset()


class TestSelectiveScan(conformance_tests(selective_scan.SUITE)):
    implementation = "chunked"
    run_twice = frozenset()
