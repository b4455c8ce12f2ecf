import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLModel

from laid.data.questions import question_text
from laid.errors import LaidError
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.models.prompts import OFFICIAL_PROMPT, PromptEncoder, mrope_positions

QUESTION = question_text("single", "star", "circle")
GRIDS = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=0, max_size=6)


@pytest.fixture(scope="module")
def processor(family):
    return Processor.load(family["small"])


@pytest.fixture(scope="module")
def rope(family):
    """(ids, grids) -> positions (3, T) as transformers' own get_rope_index gives them."""
    model: Qwen2_5_VLModel = load_model(family["small"]).model
    return lambda ids, grids: reference(model, ids, grids)


def reference(model, ids, grids):
    ids = torch.from_numpy(ids)[None]
    merge = model.config.vision_config.spatial_merge_size
    thw = torch.tensor([(1, h * merge, w * merge) for h, w in grids]) if grids else None
    kinds = (ids == model.config.image_token_id).int()
    return model.get_rope_index(ids, kinds, image_grid_thw=thw)[0][:, 0].numpy()


def by_template(tokenizer, grids, text):
    """The whole conversation rendered by the chat template, its image pads repeated, tokenized in one go."""
    content = [{"type": "image"}] * len(grids) + [{"type": "text", "text": text}]
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pieces = rendered.split("<|image_pad|>")
    pads = ["<|image_pad|>" * (h * w) for h, w in grids] + [""]
    assert len(pieces) == len(pads)
    return tokenizer("".join(a + b for a, b in zip(pieces, pads)), add_special_tokens=False)["input_ids"]


@settings(max_examples=40, deadline=None)
@given(grids=GRIDS)
def test_ids_and_positions_are_those_of_template_and_transformers(processor, rope, grids):
    prompt = processor.encoder.encode(QUESTION, grids)
    assert prompt.ids.tolist() == by_template(processor.tokenizer, grids, OFFICIAL_PROMPT + QUESTION)
    np.testing.assert_array_equal(prompt.positions, rope(prompt.ids, grids))
    assert prompt.ids.dtype == prompt.positions.dtype == prompt.block_starts.dtype == np.int64
    np.testing.assert_array_equal(prompt.image_mask, prompt.ids == processor.encoder.pad_id)
    np.testing.assert_array_equal(
        prompt.block_starts, np.flatnonzero(prompt.ids == processor.encoder.start_id)
    )
    assert prompt.span == prompt.positions.max() + 1


@settings(max_examples=40, deadline=None)
@given(
    prefix=st.integers(0, 5),
    suffix=st.integers(0, 5),
    grids=GRIDS,
    ones=st.integers(0, 4),
    mixed=st.booleans(),
)
def test_positions_token_by_token(prefix, suffix, grids, ones, mixed):
    """Against the rule written out in words; grids of 1 x 1 alone take a shortcut in the code."""
    grids = [*grids, *[(1, 1)] * ones] if mixed else [(1, 1)] * ones
    expected, at = [(p, p, p) for p in range(prefix)], prefix
    for height, width in grids:
        expected.append((at, at, at))
        at += 1
        expected += [(at, at + row, at + column) for row in range(height) for column in range(width)]
        at += max(height, width)
        expected.append((at, at, at))
        at += 1
    expected += [(p, p, p) for p in range(at, at + suffix)]
    found = mrope_positions(prefix, grids, suffix)
    assert found.dtype == np.int64
    assert found.T.tolist() == [list(p) for p in expected]


def test_a_photograph_by_hand():
    """A merged grid of 2 x 3 after two words: time stands still, then text goes on at 3 + max(2, 3)."""
    assert mrope_positions(2, [(2, 3)], 2).tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8],
    ]


def test_the_official_words(processor):
    text = processor.tokenizer.decode(processor.encoder.encode(QUESTION, [(1, 1)]).ids)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>"
        "You are given a set of images. Please answer the following question in Yes or No: "
        "For the image with a star, is there a circle?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_tokenizer_without_image_tokens_is_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    plain = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"[UNK]": 0}, "[UNK]")), unk_token="[UNK]"
    )
    with pytest.raises(LaidError, match=r"no token <\|vision_start\|>"):
        PromptEncoder(plain)


def test_a_template_without_image_blocks_is_refused(processor, family):
    tokenizer = Processor.load(family["small"]).tokenizer
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(LaidError, match="renders 0 image blocks for 1 image"):
        PromptEncoder(tokenizer).encode(QUESTION, [(1, 1)])


# ------------------------------------------------------------------ the published files


def test_published_ids_and_positions(shared):
    from transformers import AutoConfig

    folder = shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct"
    processor = Processor.load(folder)
    names = ("<|im_start|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    assert [processor.tokenizer.convert_tokens_to_ids(n) for n in names] == [151644, 151652, 151653, 151655]
    assert len(processor.tokenizer) == 151665
    grids = [(17, 23), (23, 17), (12, 23)]
    prompt = processor.encoder.encode(QUESTION, grids)
    assert prompt.ids.tolist() == by_template(processor.tokenizer, grids, OFFICIAL_PROMPT + QUESTION)
    with torch.device("meta"):
        model = Qwen2_5_VLModel._from_config(AutoConfig.from_pretrained(folder))
    np.testing.assert_array_equal(prompt.positions, reference(model, prompt.ids, grids))


def test_tokens_and_positions_of_real_photographs(shared):
    """The figures measured over 3,282 COCO images: 349.4 tokens and 24.1 positions an image, delimiters included."""
    from laid.data.coco import load_coco

    processor = Processor.load(shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct")
    images = [
        i
        for split in ("train2017", "val2017")
        for i in load_coco(shared / "coco_slice", split).images.values()
    ]
    grids = [processor.grid(i.width, i.height) for i in images]
    empty, full = (processor.encoder.encode(QUESTION, g) for g in ([], grids))
    assert (len(full.ids) - len(empty.ids)) / len(images) == pytest.approx(349.4, rel=0.03)
    assert (full.span - empty.span) / len(images) == pytest.approx(24.1, rel=0.03)


def test_a_special_token_in_a_question_is_refused(processor):
    """It would be read as that token: an image that is not there, the end of the turn."""
    for token in ("<|vision_start|>", "<|im_end|>"):
        with pytest.raises(LaidError, match="holds the special token") as caught:
            processor.encoder.encode(question_text("single", f"star {token}", "circle"), [(1, 1)])
        assert token in str(caught.value)
