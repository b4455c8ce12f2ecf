"""Tiny models of each family, Qwen2.5-VL unless said, made from a seed, for tests of hooks and attention."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

IMAGE, START, END = 60, 58, 59


def vision_config(family, hidden) -> dict:
    if family == "qwen2_vl":
        return {"depth": 1, "embed_dim": 16, "hidden_size": hidden, "num_heads": 2, "mlp_ratio": 1}
    own = {"hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": hidden}
    if family == "qwen3_vl":
        return {**own, "depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return {**own, "depth": 1, "fullatt_block_indexes": [0], "window_size": 28}


def tiny_config(
    hidden=32, layers=2, heads=4, kv_heads=2, sections=(1, 2, 1), family="qwen2_5_vl", ids=None, **text
):
    """ids: names of the special tokens -> ids, where they are not those above."""
    own = {"head_dim": hidden // heads} if family == "qwen3_vl" else {}
    return AutoConfig.for_model(
        family,
        text_config={
            "vocab_size": 64,
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": list(sections),
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **own,
            **text,
        },
        vision_config=vision_config(family, hidden),
        **{
            "image_token_id": IMAGE,
            "vision_start_token_id": START,
            "vision_end_token_id": END,
            "video_token_id": 61,
            **(ids or {}),
        },
    )


def tiny_model(seed=0, scale=0.3, dtype=torch.float32, **kwargs):
    """Weights large enough that attention is far from uniform, biases not zero, norms of queries and keys not one."""
    model = AutoModelForImageTextToText.from_config(tiny_config(**kwargs))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif "q_norm" in name or "k_norm" in name:
                parameter.copy_(1 + torch.rand(parameter.shape, generator=generator))
    return model.to(dtype).eval()


def prompt(model, grids=((4, 4), (6, 4), (4, 2)), lead=2, between=1, tail=4, seed=0):
    """(input_ids (1, T), position_ids (3, 1, T), starts): images of `grids` patches (height, width) between text."""
    generator = torch.Generator().manual_seed(seed)

    def words(n):
        return torch.randint(1, 50, (n,), generator=generator).tolist()

    ids, starts = words(lead), []
    for height, width in grids:
        starts.append(len(ids))
        ids += [START] + [IMAGE] * (height * width // 4) + [END] + words(between)
    ids += words(tail)
    input_ids = torch.tensor([ids])
    grid = torch.tensor([(1, h, w) for h, w in grids])
    positions, _ = model.model.get_rope_index(
        input_ids=input_ids, mm_token_type_ids=(input_ids == IMAGE).int(), image_grid_thw=grid
    )
    return input_ids, positions, starts
