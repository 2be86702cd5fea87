import numpy as np

from lcr.evaluation.memory import peak_bytes, reset_peak, resident_peak_bytes

MEGABYTE = 2**20


def test_peak_counts_what_was_held_for_a_moment_since_the_reset():
    was_reset = reset_peak()
    before = resident_peak_bytes()
    held = np.ones(96 * MEGABYTE, np.uint8)
    assert held[::4096].sum() == held.size // 4096
    during = resident_peak_bytes()
    del held
    assert during >= before + 64 * MEGABYTE or not was_reset
    slack = MEGABYTE  # Linux counts pages per thread and sums them now and then
    assert resident_peak_bytes() >= during - slack, "a peak does not go down by itself"
    if reset_peak():
        assert resident_peak_bytes() <= during - 64 * MEGABYTE


def test_peak_without_an_accelerator_is_that_of_the_process():
    assert abs(peak_bytes() - resident_peak_bytes()) < 64 * MEGABYTE
