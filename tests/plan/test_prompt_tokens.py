"""Lengths of prompts, from the configuration, against prompts really encoded."""

import numpy as np
import pytest

from laid.data.images import image_size
from laid.data.questions import haystack_file, read_questions
from laid.models.processing import Processor
from laid.plan.tokens import SPREAD, TEXT, VISUAL, lengths_of
from laid.settings import validate


def test_constants_are_what_real_photographs_have(shared):
    processor = Processor.load(shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct")
    files = sorted((shared / "coco_slice").glob("*2017/*.jpg"))
    tokens = np.array([np.prod(processor.grid(*image_size(file))) for file in files])
    assert len(tokens) == 415
    assert tokens.mean() == pytest.approx(VISUAL, abs=0.1) and tokens.std() == pytest.approx(SPREAD, abs=0.5)
    prompt = processor.encoder.encode("For the image with a dog, is there a sports ball?", [(16, 22)] * 2)
    assert len(prompt.ids) - 2 * (352 + 2) == TEXT
    # The paper's Table 2 prints 7,401 tokens at 20 images and 53,653 at 150; ours are 6 % and 3 % below.
    lengths = lengths_of(
        validate({"models": {"checkpoints": {"small": "a/b"}}, "data": {"source": "download"}})
    )
    assert lengths.prompt(20) == pytest.approx(7401.08, rel=0.07)
    assert lengths.prompt(150) == pytest.approx(53653.22, rel=0.03)


def test_prompts_of_rendered_scenes_to_the_token(micro, family, haystacks):
    processor, lengths = Processor.load(family["small"]), lengths_of(micro)
    for size in (1, 2, 5):
        question = read_questions(haystack_file(haystacks / "test", size))[0]
        prompt = processor.encoder.encode(question.text, [(1, 1)] * size)
        assert lengths.prompt(size) == lengths.longest(size)[0] == len(prompt.ids)


def test_distinct_images():
    lengths = lengths_of(validate({"data": {"rendered": {"train": 100, "val": 10}}}))
    rng = np.random.default_rng(0)
    drawn = [len(np.unique(rng.integers(0, 75, 60))) for _ in range(2000)]  # a quarter is kept for validation
    assert lengths.distinct("train", 60) == pytest.approx(np.mean(drawn), rel=0.01)


def test_given_lengths_are_taken():
    given = {"plan": {"images": {"tokens": 500, "spread": 10}}, "models": {"checkpoints": {"small": "a/b"}}}
    lengths = lengths_of(validate(given))
    assert lengths.prompt(4) == TEXT + 4 * 502 and lengths.longest(4) == (TEXT + 4 * 502 + 60, 2060)
