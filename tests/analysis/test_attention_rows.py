"""Attention rows against eager attention of transformers."""

import pytest
import torch

from laid.analysis.attention_rows import attention_rows
from laid.errors import LaidError
from laid.models.capture import QKCapture
from tiny_vlm import tiny_model


def test_rows_are_those_of_eager_attention_with_padding():
    model = tiny_model()
    model.set_attn_implementation("eager")
    ids = torch.randint(1, 50, (2, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[0, :3] = 0
    with QKCapture(model, [0, 1]) as capture:
        out = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=True)
        caught = capture.take()
    rows = torch.tensor([[4, 9], [0, 7]])
    for layer, qk in caught.items():
        got = attention_rows(*qk.rotated(), rows, mask).exp()
        for b in range(2):
            torch.testing.assert_close(got[b], out.attentions[layer][b][:, rows[b]], rtol=1e-4, atol=1e-6)


def test_clear_errors():
    q = torch.randn(1, 2, 4, 4)
    with pytest.raises(LaidError, match="sees no real token"):
        attention_rows(q, q, torch.tensor([[0]]), torch.tensor([[0, 1, 1, 1]]))
