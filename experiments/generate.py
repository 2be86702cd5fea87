"""Continues a text with a model: a Hugging Face folder, an RWKV-7 .pth file, or a run of this project.

    python -m experiments.generate --model=path/to/folder --prompt="The pass key is" --max_new_tokens=64
    python -m experiments.generate --model=path/to/folder --prompt_file=book.txt --temperature=0.8 --seed=1

Prints the continuation, up to the token that ends a text where the tokenizer has one; how long reading and writing took
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
    text = PROMPT.value if PROMPT.value is not None else Path(PROMPT_FILE.value).read_text(encoding="utf-8")

    import jax
    import jax.numpy as jnp
    import lcr
    import numpy as np

    try:
        model, tokenizer = lcr.load_pretrained(MODEL.value, dtype=DTYPE.value)
    except (ValueError, FileNotFoundError) as error:
        fail(str(error))
    ids = getattr(tokenizer, "prompt", tokenizer.encode)(text)  # with what begins a text, where the tokenizer says so
    eos = getattr(tokenizer, "eos", None)
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
    if eos is not None and (ends := np.flatnonzero(written == eos)).size:
        written = written[: ends[0]]
    # many models have more rows than their tokenizer has tokens
    known = written[written < tokenizer.vocab_size]
    print(tokenizer.decode(known))
    if known.size < written.size:
        print(f"{written.size - known.size} ids left out, which the tokenizer does not have", file=sys.stderr)
    seconds = time.perf_counter() - start
    print(f"{ids.size} tokens read, {written.size} written in {seconds:.1f} s, compiling included", file=sys.stderr)


if __name__ == "__main__":
    run(main)
