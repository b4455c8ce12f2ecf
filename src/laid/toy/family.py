"""The small-scale family: models of Qwen2.5-VL architecture, made of transformers' own classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from laid.data.questions import TEMPLATES, with_article
from laid.errors import LaidError
from laid.models.processing import Processor
from laid.models.prompts import OFFICIAL_PROMPT
from laid.settings.family import Family, Member
from laid.toy.tokenizer import build_tokenizer

LIST_QUESTION = "For the image with {anchor}, what is there?"


def build_processor(categories: Sequence[str], image_pixels: int) -> Processor:
    """Tokenizer over the words that questions about `categories` use, and Qwen's image processor.

    image_pixels: pixels an image is resized to; 784 = 28 x 28 gives one visual token of 2 x 2 patches, 3136 gives 2 x 2 tokens.
    """
    sentences = [
        OFFICIAL_PROMPT,
        LIST_QUESTION,
        "system user assistant You are a helpful assistant.",
        "yes no Yes No",
    ]
    sentences += [t.format(anchor="a thing", target="an object") for t in TEMPLATES.values()]
    words = [word for name in categories for word in with_article(name).split()]
    tokenizer = build_tokenizer(sentences, words)
    images = Qwen2VLImageProcessorPil(size={"shortest_edge": image_pixels, "longest_edge": image_pixels})
    return Processor(tokenizer, images)


def build_config(processor: Processor, family: Family, member: Member) -> Qwen2_5_VLConfig:
    """The configuration of one member. `family`, `member`: the sections of config.yaml of those names.

    Raises LaidError where sizes contradict each other: transformers' Qwen2.5-VL takes hidden_size / heads as
    head_dim.
    """
    hidden, heads, kv_heads, head_dim = (
        member.hidden_size,
        member.heads,
        member.kv_heads,
        family.head_dim,
    )
    if hidden != heads * head_dim:
        raise LaidError(
            f"family: hidden_size {hidden} is not {heads} heads x head_dim {head_dim} = {heads * head_dim};"
            " make them agree"
        )
    if heads % kv_heads:
        raise LaidError(f"family: {heads} heads cannot share {kv_heads} kv_heads: give a divisor of {heads}")
    if 2 * sum(family.mrope_section) != head_dim:
        raise LaidError(
            f"family: mrope_section {family.mrope_section} adds up to {sum(family.mrope_section)},"
            f" head_dim {head_dim} has {head_dim // 2} frequencies; make them agree"
        )
    tokenizer, encoder = processor.tokenizer, processor.encoder
    vision = family.vision
    images = processor.image_processor
    # The trained positions, as in a published config: what pretraining's gaps or the member's own window cover.
    side = round(family.image_pixels**0.5)
    longest = encoder.encode(TEMPLATES["single"], [processor.grid(side, side)] * member.window).span
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": member.hidden_size,
            "intermediate_size": member.intermediate_size,
            "num_hidden_layers": member.layers,
            "num_attention_heads": member.heads,
            "num_key_value_heads": member.kv_heads,
            "head_dim": family.head_dim,
            "max_position_embeddings": -(-max(longest, family.pretrain.reach) // 16) * 16,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": float(family.rope_theta),
                "mrope_section": list(family.mrope_section),
            },
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": vision.depth,
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_heads": vision.heads,
            "out_hidden_size": member.hidden_size,
            "patch_size": images.patch_size,
            "temporal_patch_size": images.temporal_patch_size,
            "spatial_merge_size": images.merge_size,
            "window_size": 4 * images.patch_size * images.merge_size,
            "fullatt_block_indexes": [vision.depth - 1],
        },
        image_token_id=encoder.pad_id,
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=encoder.start_id,
        vision_end_token_id=encoder.end_id,
        tie_word_embeddings=False,
    )


def build_model(config: Qwen2_5_VLConfig, seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """A model with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    return model
