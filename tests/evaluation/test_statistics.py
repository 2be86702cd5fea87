import pytest

from lcr.evaluation.statistics import wilson_interval


# the first four are in Newcombe 1998 (Statistics in Medicine 17:857), table I, method 3
@pytest.mark.parametrize(
    "successes, trials, low, high",
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0000),
        (1, 1, 0.2065, 1.0000),
    ],
)
def test_wilson_interval_has_the_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_interval_is_symmetric_and_shrinks_with_more_trials():
    low, high = wilson_interval(30, 100)
    other_low, other_high = wilson_interval(70, 100)
    assert (1 - high, 1 - low) == pytest.approx((other_low, other_high))
    wider = wilson_interval(3, 10)
    assert wider[0] < low < 0.3 < high < wider[1]


@pytest.mark.parametrize("trials", [1, 7, 1000])
def test_interval_stays_within_zero_and_one(trials):
    for successes in (0, trials):
        low, high = wilson_interval(successes, trials)
        assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(
    "successes, trials, named", [(0, 0, "trials=0"), (3, 2, "successes=3"), (-1, 2, "successes=-1")]
)
def test_impossible_counts_are_refused(successes, trials, named):
    with pytest.raises(ValueError, match=named):
        wilson_interval(successes, trials)
