"""The vision tower's closed forms against the real tower, measured."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from laid.analysis.inference_cost import COUNTED
from laid.plan.measure import peak_bytes
from laid.plan.shapes import meta_model, published_config
from laid.plan.vision import image_flops, pass_bytes


@pytest.mark.parametrize("side", [8, 12])
def test_a_pass_of_the_tower(side):
    """Two images of side x side merged tokens through a narrow tower of the real make, four blocks, one of them full."""
    config = published_config("Qwen/Qwen2.5-VL-3B-Instruct")
    text, vision = config.get_text_config(), config.vision_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size, text.vocab_size = 64, 1, 64, 64
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 2, 2, text.layer_types[:1]
    text.eos_token_id = text.pad_token_id = 0
    vision.depth, vision.fullatt_block_indexes, vision.out_hidden_size = 4, [3], 64
    vision.hidden_size, vision.num_heads, vision.intermediate_size = 320, 4, 855
    model = meta_model(config, "float32", device="cpu")
    images, patches = 2, 4 * side * side
    pixels = torch.randn(images * patches, 1176)
    grid = torch.tensor([[1, 2 * side, 2 * side]] * images)

    @torch.no_grad()
    def see():
        model.model.get_image_features(pixels, grid)

    see()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        see()
    assert image_flops(model, side * side) * images == pytest.approx(counter.get_total_flops(), rel=0.05)
    # Pixels are there before the pass begins.
    expected = pass_bytes(config, images, side * side, 4)
    assert expected == pytest.approx(peak_bytes(see) + pixels.nbytes, rel=0.15)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_pass_of_another_family_s_tower(family):
    """Towers without windows: every patch of an image sees all of it."""
    vision = {"depth": 4, "num_heads": 4, "in_channels": 3, "patch_size": 14, "spatial_merge_size": 2}
    vision |= {"temporal_patch_size": 2}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 320, "hidden_size": 64, "mlp_ratio": 4}
    else:
        vision |= {"hidden_size": 320, "intermediate_size": 1280, "out_hidden_size": 64}
        vision |= {"deepstack_visual_indexes": [], "num_position_embeddings": 256}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 64}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    config = AutoConfig.for_model(family, vision_config=vision, text_config=text | {"rope_parameters": rope})
    config.get_text_config().pad_token_id = 0
    model = meta_model(config, "float32", device="cpu")
    images, side = 2, 8
    patches = 4 * side * side
    pixels = torch.randn(images * patches, 1176)
    grid = torch.tensor([[1, 2 * side, 2 * side]] * images)

    @torch.no_grad()
    def see():
        model.model.get_image_features(pixels, grid)

    see()
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        see()
    assert image_flops(model, side * side) * images == pytest.approx(counter.get_total_flops(), rel=0.05)
    expected = pass_bytes(config, images, side * side, 4)
    assert expected == pytest.approx(peak_bytes(see) + pixels.nbytes, rel=0.15)
