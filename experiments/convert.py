"""Turns a checkpoint of others into a run of this project, or a run into a folder that `transformers` loads.

    python -m experiments.convert --source=path/to/folder --target=runs/llama        # Hugging Face, or .pth, to Orbax
    python -m experiments.convert --source=runs/llama --target=path/to/new_folder    # Orbax to Hugging Face
    python -m experiments.convert --source=model.pth --target=path/to/new_folder --format=huggingface

What a run gets is checkpoint 0 of experiments/configs/finetune.py, whose configuration goes with it:
`python -m experiments.train --config=experiments/configs/finetune.py:path/to/folder --workdir=runs/llama` goes on from
there, `python -m experiments.evaluate --model=runs/llama ...` asks it for passkeys. Its parameters are float32. A folder
gets the dtype of the checkpoint that it came from, and the files of its tokenizer.

Exit codes: 0 done; 2 a mistake in the command, or nothing to convert; 130 stopped by Ctrl-C.
"""

from pathlib import Path

from absl import flags

from experiments.flags import fail, run

SOURCE = flags.DEFINE_string("source", None, "A Hugging Face folder, an RWKV-7 .pth file, or a run's folder.")
TARGET = flags.DEFINE_string("target", None, "The folder to write; it must not be there yet.")
FORMAT = flags.DEFINE_enum(
    "format", None, ["orbax", "huggingface"], "What to write; the other of what the source is, if not given."
)
FAMILY = flags.DEFINE_string("family", None, "For huggingface: its model_type; the nearest if not given.")
DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16", "float16"], "For huggingface: of the tensors, if not as they came."
)
STEP = flags.DEFINE_integer("step", None, "Of a run: the checkpoint to convert; the newest if not given.")
flags.mark_flags_as_required(["source", "target"])


def main() -> None:
    from lcr.pretrained.load import is_run
    from lcr.training.checkpoints import CheckpointError
    from lcr.training.config import ConfigError

    source, target = Path(SOURCE.value), Path(TARGET.value)
    wanted = FORMAT.value or ("huggingface" if is_run(source) else "orbax")
    if wanted == "orbax" and (FAMILY.value or DTYPE.value):
        fail("--family and --dtype are of --format=huggingface; a run's parameters are float32")
    if STEP.value is not None and not is_run(source):
        fail(f"--step={STEP.value}: {source} is no run and has no steps")
    if wanted == "orbax" and is_run(source):
        fail(f"--source={source} is a run, which is in Orbax already; expected --format=huggingface")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        fail(f"--target={target}: exists already; expected a new folder")
    try:
        (to_run if wanted == "orbax" else to_folder)(source, target)
    except (ValueError, OSError, ConfigError, CheckpointError) as error:
        fail(str(error))
    print(f"{source} is now in {target}")


def to_run(source: Path, target: Path) -> None:
    from experiments.configs.finetune import get_config
    from lcr.training.trainer import write_first_checkpoint

    write_first_checkpoint(get_config(str(source)), target)


def to_folder(source: Path, target: Path) -> None:
    import lcr
    from lcr.pretrained.load import is_run

    if is_run(source):
        from lcr.training.run import load_run

        loaded = load_run(source, STEP.value)
        model, tokenizer = loaded.model, loaded.task.tokenizer
    else:
        model, tokenizer = lcr.load_pretrained(source)
    lcr.save_pretrained(
        model, target, tokenizer=tokenizer, family=FAMILY.value, dtype=DTYPE.value, overwrite=target.is_dir()
    )


if __name__ == "__main__":
    run(main)
