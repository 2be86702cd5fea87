"""Times decoding against `transformers` on the same random checkpoint: python -m experiments.benchmark_decoding

Needs the extra [parity] (PyTorch and transformers). For a Mamba, a Mamba-2, a Llama with grouped heads and a Jamba of
about 30 million parameters, in float32 on the CPU: transformers writes a checkpoint, both read it, both read a prompt
of 2,048 tokens and write 65 more, greedily; what is timed is the last 64 of these. Medians of calls taken in turns. The
Llama comes in two shapes: 8 layers of width 512, and 18 of width 384, the proportions of SmolLM2-135M. The results go
to experiments/benchmarks/decoding.json.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

PROMPT, WRITTEN = 2048, 64
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each kind; the median counts.", lower_bound=1)
MODELS = flags.DEFINE_list("models", [], "Which models (mamba, mamba2, ...); none: all.")
OUT = flags.DEFINE_string("out", "experiments/benchmarks/decoding.json", "Where the results go.")


def configurations() -> dict[str, Any]:
    from transformers import JambaConfig, LlamaConfig, Mamba2Config, MambaConfig

    return {
        "mamba": MambaConfig(vocab_size=8192, hidden_size=512, num_hidden_layers=16),
        "mamba2": Mamba2Config(
            vocab_size=8192, hidden_size=512, num_hidden_layers=15, num_heads=16, n_groups=1, state_size=128,
            tie_word_embeddings=True,
        ),
        "llama": LlamaConfig(
            vocab_size=8192, hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=4096,
        ),
        "llama, deep": LlamaConfig(
            vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=18, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=4096, tie_word_embeddings=True,
        ),
        "jamba": JambaConfig(
            vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=6,
            num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, use_mamba_kernels=False,
        ),
    }  # fmt: skip


def main(argv: list[str]) -> None:
    os.environ["JAX_PLATFORMS"] = "cpu"
    known = configurations()
    rows = []
    for name in MODELS.value or known:
        if name not in known:
            raise app.UsageError(f"--models={name}: expected some of {', '.join(known)}")
        rows.append(measure(name, known[name]))
        print(rows[-1], flush=True)
    import jax
    import torch
    import transformers

    versions = {module.__name__: module.__version__ for module in (jax, torch, transformers)}
    machine = {"cores": len(os.sched_getaffinity(0)), "versions": versions, "date": time.strftime("%Y-%m-%d")}
    out = Path(OUT.value)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": machine, "prompt": PROMPT, "written": WRITTEN, "rows": rows}, indent=1) + "\n")
    titles = list(rows[0])
    for cells in (titles, ["---"] * len(titles), *([str(row[title]) for title in titles] for row in rows)):
        print("| " + " | ".join(cells) + " |")


def measure(name: str, config: Any) -> dict[str, Any]:
    """A row of the table."""
    import jax
    import lcr
    import torch
    import transformers

    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours, _ = lcr.load_pretrained(folder, progress=False)
    prompt = np.random.default_rng(0).integers(3, config.vocab_size, (1, PROMPT))

    class Clock(transformers.generation.streamers.BaseStreamer):
        """When each token came; the first call is the prompt's."""

        def __init__(self):
            self.times = []

        def put(self, value):
            self.times.append(time.perf_counter())

        def end(self):
            pass

    def by_theirs() -> tuple[Any, float, float]:
        """The tokens written, and the seconds of the prompt and of the tokens after the first."""
        clock, start = Clock(), time.perf_counter()
        with torch.no_grad():
            tokens = theirs.generate(
                torch.from_numpy(prompt), max_new_tokens=WRITTEN + 1, min_new_tokens=WRITTEN + 1, do_sample=False,
                attention_mask=torch.ones(prompt.shape, dtype=torch.long), pad_token_id=0, eos_token_id=None,
                streamer=clock,
            )  # fmt: skip
        return tokens.numpy()[:, PROMPT:], clock.times[1] - start, clock.times[-1] - clock.times[1]

    def by_ours() -> tuple[Any, float, float]:
        start = time.perf_counter()
        empty = ours.init_states(1, PROMPT + WRITTEN + 2)
        first, states = lcr.generate(ours, jax.numpy.asarray(prompt, "int32"), max_new_tokens=1, states=empty)
        first.block_until_ready()
        read = time.perf_counter()
        # what is written here is not compared: the token after `first` is not known, so `first` is read once more
        tokens, _ = lcr.generate(ours, first, max_new_tokens=WRITTEN, states=states)
        tokens.block_until_ready()
        return tokens, read - start, time.perf_counter() - read

    by_ours()  # compiles
    # random weights make ties likely enough that rounding decides between two tokens now and then
    whole, _ = lcr.generate(ours, jax.numpy.asarray(prompt, "int32"), max_new_tokens=WRITTEN + 1)
    agreeing = float((by_theirs()[0] == np.asarray(whole)).mean())
    calls = {"ours": by_ours, "transformers": by_theirs}
    times: dict[str, list[tuple[float, float]]] = {who: [] for who in calls}
    for _ in range(REPEATS.value):
        for who, call in calls.items():
            times[who].append(call()[1:])
    seconds = {who: [statistics.median(column) for column in zip(*of_calls, strict=True)] for who, of_calls in times.items()}
    rate = {who: WRITTEN / decoding for who, (_, decoding) in seconds.items()}
    return {
        "model": name,
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "decoding tokens/s": round(rate["ours"], 1),
        "transformers tokens/s": round(rate["transformers"], 1),
        "ratio": round(rate["ours"] / rate["transformers"], 2),
        "prefill s": round(seconds["ours"][0], 3),
        "transformers prefill s": round(seconds["transformers"][0], 3),
        "same tokens": round(agreeing, 3),
    }


if __name__ == "__main__":
    app.run(main)
