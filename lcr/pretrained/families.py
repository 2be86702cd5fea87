"""Every family by its `model_type`. A new one costs one file beside this one and one line in `FAMILIES`."""

from lcr.pretrained import (
    deepseek_v2, deepseek_v3, delta_net, falcon_mamba, gated_deltanet, gemma2, gemma3, gla, jamba, llama, mamba,
    mamba2, mistral, mixtral, phi3, qwen2, qwen3, retnet, rwkv4, rwkv6, rwkv7,
)  # fmt: skip
from lcr.pretrained.family import Family

FAMILIES: dict[str, Family] = {
    family.FAMILY.model_type: family.FAMILY
    for family in (
        llama,
        mistral,
        mixtral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        phi3,
        deepseek_v2,
        deepseek_v3,
        mamba,
        falcon_mamba,
        mamba2,
        jamba,
        rwkv4,
        rwkv6,
        rwkv7,
        retnet,
        gla,
        delta_net,
        gated_deltanet,
    )  # fmt: skip
}
