"""Continues a text with a model: a Hugging Face folder, an RWKV-7 .pth file, or a run of this project.

    python -m experiments.generate --model=path/to/folder --prompt="The pass key is" --max_new_tokens=64
    python -m experiments.generate --model=path/to/folder --prompt_file=book.txt --temperature=0.8 --seed=1

Prints the continuation, up to the first token that ends a text where the tokenizer has any; how long reading and writing took
goes to stderr.

Exit codes: 0 done; 2 a mistake in the command, or no model to load; 130 stopped by Ctrl-C.
"""

import sys
import time
from pathlib import Path

from absl import flags

from experiments.flags import fail, run

MODEL = flags.DEFINE_string("model", None, "A checkpoint's folder, a .pth file, or a run's folder.")
PROMPT = flags.DEFINE_string("prompt", None, "The text to go on from.")
PROMPT_FILE = flags.DEFINE_string("prompt_file", None, "A file that holds it, instead.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 64, "Tokens to write, at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the likeliest token each time.", lower_bound=0.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
DTYPE = flags.DEFINE_enum("dtype", None, ["float32", "bfloat16"], "Of the compute; the checkpoint's own if not given.")
flags.mark_flags_as_required(["model"])


def main() -> None:
    if (PROMPT.value is None) == (PROMPT_FILE.value is None):
        fail("expected --prompt=TEXT or --prompt_file=FILE, one of the two")
    text = PROMPT.value if PROMPT.value is not None else read_prompt(Path(PROMPT_FILE.value))

    import jax
    import jax.numpy as jnp
    import lcr
    import numpy as np

    try:
        model, tokenizer = lcr.load_pretrained(MODEL.value, dtype=DTYPE.value)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    try:
        ids = getattr(tokenizer, "prompt", tokenizer.encode)(text)  # with what begins a text, where the tokenizer says so
    except (ValueError, TypeError) as error:  # TypeError: of the library, for what is no Unicode
        fail(f"the prompt: {error}; expected a text that the {tokenizer.name!r} tokenizer can write")
    if not ids.size:
        fail("the prompt is empty: expected at least one token")
    if ids.max() >= model.config.vocab_size:
        fail(
            f"--prompt: the {tokenizer.name!r} tokenizer gives the id {ids.max()}, the model has {model.config.vocab_size} "
            "tokens; expected the files of the model's own tokenizer beside it"
        )
    start = time.perf_counter()
    tokens, _ = lcr.generate(
        model,
        jnp.asarray(ids)[None],
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        key=jax.random.key(SEED.value),
    )
    written = np.asarray(tokens)[0]
    if (ends := np.flatnonzero(np.isin(written, getattr(tokenizer, "eos", ())))).size:
        written = written[: ends[0]]
    # many models have more rows than their tokenizer has tokens
    known = written[written < tokenizer.vocab_size]
    print(tokenizer.decode(known))
    if known.size < written.size:
        print(f"{written.size - known.size} ids left out, which the tokenizer does not have", file=sys.stderr)
    seconds = time.perf_counter() - start
    print(f"{ids.size} tokens read, {written.size} written in {seconds:.1f} s, compiling included", file=sys.stderr)


def read_prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        fail(f"--prompt_file={path}: no UTF-8 at byte {error.start}; expected a text in UTF-8")
    except OSError as error:
        fail(f"--prompt_file={path}: {error.strerror}; expected a file with the text to go on from")


if __name__ == "__main__":
    run(main)
