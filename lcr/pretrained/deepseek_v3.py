"""DeepSeek-V3 (arXiv 2412.19437): V2 with sigmoid routing, balanced by a bias. Its extra layers are left out."""

from typing import Any

from lcr.models.config import ModelConfig
from lcr.pretrained import deepseek_v2
from lcr.pretrained.family import Family, transformer_fields
from lcr.pretrained.fields import Fields


def read(c: Fields) -> dict[str, Any]:
    sizes = transformer_fields(c, vocab_size=129_280, hidden_size=7168, intermediate_size=18_432, num_layers=61)
    c.only("scoring_func", "sigmoid")
    c.only("topk_method", "noaux_tc")
    c.only("mlp_bias", False)
    for name in ("num_nextn_predict_layers", "num_mtp_layers", "ep_size", "aux_loss_alpha", "seq_aux"):
        c.get(name, None)  # of training, and of the extra layers
    mixture = {
        "num_experts": c.count("n_routed_experts", c.count("num_local_experts", 256)),
        "top_k": c.whole("num_experts_per_tok", 8),
        "num_shared": c.whole("n_shared_experts", 1, least=0),
        "num_groups": c.whole("n_group", 8),
        "top_groups": c.whole("topk_group", 4),
        "normalize": not c.null("norm_topk_prob") and c.flag("norm_topk_prob", True),
        "scoring": "sigmoid",
        "balance": "bias",
    }
    return deepseek_v2.read_layers(c, sizes, mixture, num_heads=128, dense=3, d_expert=2048, weight=2.5, longest=4096)


def write(config: ModelConfig) -> dict[str, Any]:
    mixture = config.feed_forward_options.get("moe", {})
    return deepseek_v2.write_layers(config) | {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": mixture.get("normalize", True),
        "num_nextn_predict_layers": 0,
    }


FAMILY = Family(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    read,
    write,
    deepseek_v2.lines,
    mixers=("mla",),
    extra_layers=True,
)
