"""The vision tower's cost, in closed form: images are many and alike, windows small."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

BATCH = 64  # images in a pass (laid.models.features)


def tower(model: PreTrainedModel):
    """The vision tower of a model."""
    return model.model.visual


def width(vision: PreTrainedConfig) -> int:
    """Of the tower's residual stream: Qwen2-VL calls it embed_dim, and by hidden_size means the language model's."""
    return getattr(vision, "embed_dim", None) or vision.hidden_size


def image_flops(model: PreTrainedModel, visual: float) -> float:
    """FLOPs of one image of `visual` merged tokens: 2 per weight and patch, attention within windows or the image."""
    v, config = tower(model), model.config.vision_config
    merge = config.spatial_merge_size**2
    patches = visual * merge
    per_patch = [
        p for name, p in v.named_parameters() if name.startswith(("patch_embed", "blocks")) and p.ndim > 1
    ]
    merger = [p for name, p in v.named_parameters() if name.startswith("merger") and p.ndim > 1]
    linear = 2 * patches * sum(p.numel() for p in per_patch) + 2 * visual * sum(p.numel() for p in merger)
    full, window = config.depth, patches
    if hasattr(config, "window_size"):
        window = min(patches, (config.window_size // config.patch_size) ** 2)
        full = len(config.fullatt_block_indexes)
    return linear + 4 * width(config) * patches * (full * patches + (config.depth - full) * window)


def pass_bytes(config: PreTrainedConfig, images: int, visual: float, itemsize: int) -> int:
    """Peak bytes above the weights while `images` images go through together.

    The worst moment is the rotation of keys in a block: beside the residual stream and the normed input stand q, k and
    v, float32 copies of q and k, the rotated q, and what rotating k makes: two products, a half turned, a sum.
    """
    v = config.vision_config
    h, rotation = width(v), 5 * itemsize + 4 * 6
    if hasattr(v, "mlp_ratio"):  # Qwen2-VL's wide MLP and its activation in three steps outweigh that
        rotation = max(rotation, int((2 + 3 * v.mlp_ratio) * itemsize))
    patches = images * visual * v.spatial_merge_size**2
    pixels = 3 * v.temporal_patch_size * v.patch_size**2 * 4
    return int(patches * (pixels + h * rotation))
