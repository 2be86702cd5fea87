import numpy as np
import pytest
from experiments.routing_collapse.charts import TITLES, draw, table
from experiments.routing_collapse.config import VARIANTS, get_config
from lcr.training.config import check_keys


def rows(load):
    """Ten rows of metrics; load: of each expert, in both of two layers."""
    entropy = -sum(x * np.log(x) for x in load if x)
    return [
        {"step": step, "loss": 3.0 - 0.1 * step, "routing_entropy": entropy, "expert_load": [load, load]}
        for step in range(1, 11)
    ]


COLLAPSED, BALANCED = [1.0, 0.0, 0.0, 0.0], [0.25] * 4
ROWS = {"none": rows(COLLAPSED), "loss": rows(BALANCED), "bias": rows(BALANCED)}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_variants_differ_in_what_balances_alone(variant):
    config = get_config(variant)
    check_keys(config)
    assert config.model.feed_forward_options.moe.balance == variant
    config.name, config.model.feed_forward_options.moe.balance = "none", "none"
    assert config.to_dict() == get_config("none").to_dict()


def test_the_table_is_of_the_last_rows():
    head, *lines = table(ROWS).splitlines()
    assert head.split() == "balancing loss busiest expert experts in use entropy".split()
    # loss: the mean of steps 6 to 10
    assert [line.split()[-4:] for line in lines] == [
        ["2.200", "100.0%", "1.00", "0.00"], ["2.200", "25.0%", "4.00", "1.39"], ["2.200", "25.0%", "4.00", "1.39"]
    ]  # fmt: skip


def test_the_chart_has_the_loads_of_each_layer_and_run_and_the_losses():
    *loads, losses = draw(ROWS).axes
    assert [axes.get_title() for axes in loads if axes.get_title()] == [TITLES[variant] for variant in VARIANTS]
    assert len(loads) == 2 * len(VARIANTS) and len(losses.get_lines()) == len(VARIANTS)
    first = loads[0].collections[0].get_paths()[0].get_extents()
    assert (first.y0, first.y1) == (0, 1), "one expert has all"
