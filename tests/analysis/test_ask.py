"""`laid ask` against transformers' own generation, logits and attention."""

import itertools

import pytest
import torch

from laid.analysis.ask import ask, images_in
from laid.errors import LaidError
from laid.methods.registry import load_with_method
from laid.results.looking import show


@torch.no_grad()
def test_answer_probability_and_attention_are_the_models_own(micro, family, coco_root, tmp_path):
    loaded = load_with_method(micro, "base", family["small"], None)
    images = images_in(coco_root / "val2017")[:4]
    answer = ask(loaded, images, "For the image with a star, is there a circle?", most=3)
    processor = loaded.processor
    pixels, grid = processor.pixels(images)
    prompt = processor.encoder.encode(
        "For the image with a star, is there a circle?", [(h // 2, w // 2) for _, h, w in grid.tolist()]
    )
    ids = torch.from_numpy(prompt.ids)[None]
    loaded.model.set_attn_implementation("eager")
    chance = 1.0
    for step in range(3):
        out = loaded.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, image_grid_thw=grid,
            mm_token_type_ids=(ids == processor.encoder.pad_id).int(), output_attentions=True,
        )  # fmt: skip
        best = out.logits[0, -1].softmax(-1).max(-1)
        if step == 0:
            attentions = torch.stack([a[0] for a in out.attentions])
        chance *= float(best.values)
        ids = torch.cat([ids, best.indices.view(1, 1)], 1)
        if processor.tokenizer.decode(best.indices) == "<|im_end|>":
            break
    said = processor.tokenizer.decode(ids[0, len(prompt.ids) :], skip_special_tokens=True).strip()
    assert answer.text == said and answer.probability == pytest.approx(chance, rel=1e-3)
    starts = [*prompt.block_starts.tolist(), prompt.block_starts[-1] + 2 + grid[-1].prod().item() // 4]
    tokens = processor.tokenizer.convert_ids_to_tokens(prompt.ids.tolist())
    asked = starts[-1] + tokens[starts[-1] :].index("For")  # behind the official words
    for k, (begin, end) in enumerate(itertools.pairwise(starts)):
        share, row = attentions[:, :, asked:, begin:end].sum(-1).max(-1)
        torch.testing.assert_close(
            torch.from_numpy(answer.shares[:, :, k]).float(), share, rtol=1e-3, atol=1e-5
        )
    show(
        answer, images, "Which costs $_{ and which $^?", tmp_path / "look.png"
    )  # no formula, whatever it holds
    assert (tmp_path / "look.png").read_bytes().startswith(b"\x89PNG")
    layer, head, share, word = answer.head_of(3)
    assert share == answer.shares[:, :, 3].max() == answer.shares[layer, head, 3]
    assert word == processor.tokenizer.decode([prompt.ids[asked + row[layer, head]]]).strip()


def test_a_folder_without_images_is_told(tmp_path):
    (tmp_path / "._a.jpg").touch()
    with pytest.raises(LaidError, match="holds no images"):
        images_in(tmp_path)
    with pytest.raises(LaidError, match="no such folder of images"):
        images_in(tmp_path / "x")


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (" ", "is blank"),
        ("Is <|image_pad|> there?", "holds <.image_pad.>"),
        ("Is \udcff there?", "half a character"),
    ],
)
def test_what_is_no_question_is_told(micro, family, coco_root, question, said):
    loaded = load_with_method(micro, "base", family["small"], None)
    with pytest.raises(LaidError, match=said):
        ask(loaded, images_in(coco_root / "val2017")[:1], question)
