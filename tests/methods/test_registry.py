"""What a configuration asks for is what is put on the student."""

import pytest
import torch

from laid.methods.registry import load_with_method
from laid.methods.self_extend import apply_self_extend
from laid.methods.yarn import apply_yarn
from laid.models.loading import load_model


@pytest.mark.parametrize(
    "method, axes",
    [("yarn", a) for a in ("all", "time", "image_base")]
    + [("self_extend", a) for a in ("all", "text", "image_base")],
)
@torch.no_grad()
def test_variants_of_the_baselines(micro, family, method, axes):
    config = micro.changed({"methods": {method: {"axes": axes}}})
    ids = torch.arange(40)[None]
    # an image of 4 x 4 tokens in the middle, so that the axes differ
    at = torch.cat((torch.arange(12), torch.full((16,), 12), torch.arange(16, 28))).expand(3, 1, -1).clone()
    at[1, 0, 12:28] += torch.arange(4).repeat_interleave(4)
    at[2, 0, 12:28] += torch.arange(4).repeat(4)

    def logits(model):
        return model(input_ids=ids, position_ids=at, use_cache=False).logits

    plain = load_model(family["small"])
    base = logits(plain)
    if method == "yarn":
        apply_yarn(plain, 2.0, plain.config.text_config.max_position_embeddings, axes)
    else:
        apply_self_extend(plain, 2, 16, axes)
    found = logits(load_with_method(config, method, family["small"], None).model)
    assert torch.equal(found, logits(plain))
    assert (found - base).abs().max() > 1e-3
