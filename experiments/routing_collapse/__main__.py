"""Does a router left to itself use its experts? Trains one small mixture of experts three ways and draws their loads.

    python -m experiments.routing_collapse --workdir=runs/routing_collapse

Balancing: none, the auxiliary loss of Switch, the bias of DeepSeek-V3 (see config.py). The workdir gets a run for each
and routing_collapse.png: the share of tokens that each expert got, over training, and the losses. The same command
given again goes on where it was.
"""

from pathlib import Path

from absl import flags

from experiments.flags import run

WORKDIR = flags.DEFINE_string("workdir", None, "The folder of the three runs and of the chart; made if not there.")
STEPS = flags.DEFINE_integer("steps", None, "Steps of each run; the configuration's if not given.", lower_bound=1)
flags.mark_flags_as_required(["workdir"])


def main() -> None:
    from experiments.routing_collapse.charts import draw, table
    from experiments.routing_collapse.config import VARIANTS, get_config
    from lcr.training.metrics import METRICS, read_rows
    from lcr.training.trainer import train

    workdir = Path(WORKDIR.value)
    rows = {}
    for variant in VARIANTS:
        config = get_config(variant)
        if STEPS.value is not None:
            config.training.steps = STEPS.value
            config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, STEPS.value)
        train(config, workdir / variant)
        rows[variant] = read_rows(workdir / variant / METRICS)
    draw(rows).savefig(workdir / "routing_collapse.png", dpi=150)
    print(table(rows))
    print(f"chart  {workdir / 'routing_collapse.png'}")


if __name__ == "__main__":
    run(main)
