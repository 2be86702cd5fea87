"""Trains a model as a configuration says, or goes on with a run that was interrupted.

    python -m experiments.train --config=experiments/configs/passkey.py:mamba --workdir=runs/mamba
    python -m experiments.train --config=experiments/configs/passkey.py:gqa --workdir=runs/gqa \\
        --config.optimizer.learning_rate=1e-3 --config.data.lengths=128,256,512

After the colon comes the file's variant. Any value can be overridden: --config.<section>.<key>=<value>.

The workdir gets config.json, metrics.jsonl, tensorboard/ and checkpoints/<step>/. The same command given again goes
on from the newest good checkpoint, with the same result as if nothing had happened. SIGTERM or Ctrl-C saves the step
under way and stops; a second one stops at once.

Exit codes: 0 trained to the end; 2 a mistake in the command or the configuration; 1 the run could not go on (full
disk, loss not finite: the message has the last good checkpoint); 143 or 130 stopped by SIGTERM or Ctrl-C.
"""

from absl import flags

from experiments.flags import define_config, run

CONFIG = define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "The run's folder; made if it is not there.")
flags.mark_flags_as_required(["config", "workdir"])


def main() -> None:
    from lcr.training.trainer import train

    row = train(CONFIG.value, WORKDIR.value)
    print(
        f"{row['step']} steps in {row['seconds']:.0f} s: loss {row['loss']:.4f}, accuracy {row['accuracy']:.4f}; "
        f"the run is in {WORKDIR.value}"
    )


if __name__ == "__main__":
    run(main)
