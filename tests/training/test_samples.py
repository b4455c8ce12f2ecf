import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from laid.data.chat import of_question
from laid.data.questions import ordered_images, read_questions
from laid.errors import LaidError
from laid.models.features import ImageFeatures
from laid.models.loading import load_model
from laid.models.processing import Processor
from laid.training.samples import batches_of, build_samples, mislabelled


@pytest.fixture(scope="module")
def features(family, coco_root):
    processor = Processor.load(family["small"], min_pixels=56 * 56, max_pixels=56 * 56)
    return ImageFeatures(load_model(family["small"]), processor, lambda path: coco_root / path)


def test_a_sample_is_the_prompt_and_its_answer(features, haystacks):
    questions = read_questions(haystacks / "train.json")
    tokenizer, encoder = features.processor.tokenizer, features.processor.encoder
    samples = build_samples([of_question(q, 7) for q in questions], features)
    assert {q.answer for q in questions} == {"yes", "no"}
    for k, (sample, question) in enumerate(zip(samples, questions, strict=True)):
        paths, _ = ordered_images(question, 7)
        prompt = encoder.encode(question.text, [(2, 2)] * question.size)
        assert sample.index == k and sample.paths == paths
        assert sample.prompt.ids[:-1].tolist() == prompt.ids.tolist()
        assert tokenizer.decode(sample.prompt.ids[-1]) == question.answer
        assert [tokenizer.decode(i) for i in sample.labels] == [question.answer, "<|im_end|>"]
        # what is predicted at the last two tokens: the token after each
        assert sample.prompt.ids[sample.answer_at + 1] == sample.labels[0]
        assert (
            sample.prompt.positions[:, -1].tolist() == [prompt.span] * 3
            and sample.prompt.span == prompt.span + 1
        )
        assert not sample.prompt.image_mask[-1] and sample.prompt.image_mask.sum() == 4 * question.size
        text = tokenizer.decode(sample.prompt.ids[sample.text_start :])
        assert text.startswith("You are given a set of images.") and "<|vision_end|>" not in text


def test_a_share_of_the_labels_is_turned_and_nothing_else(features, haystacks):
    questions = read_questions(haystacks / "train.json")
    samples = build_samples([of_question(q, 7) for q in questions], features)
    said = features.processor.tokenizer.decode
    wrong = mislabelled(samples, 0.2, [0, 8])
    turned = [k for k, (a, b) in enumerate(zip(samples, wrong, strict=True)) if (a.labels != b.labels).any()]
    # of 40 or so labels a fifth, give or take four standard errors
    assert abs(len(turned) - 0.2 * len(samples)) < 4 * (0.16 * len(samples)) ** 0.5 and turned
    for k in turned:
        other = {"yes": "no", "no": "yes"}[questions[k].answer]
        assert [said(i) for i in wrong[k].labels] == [other, "<|im_end|>"]
        assert wrong[k].prompt is samples[k].prompt
    for none, every in ((mislabelled(samples, 0.0, [0]), mislabelled(samples, 1.0, [0])),):
        assert all((a.labels == b.labels).all() for a, b in zip(none, samples, strict=True))
        assert all((a.labels != b.labels).any() for a, b in zip(every, samples, strict=True))
    with pytest.raises(LaidError, match="has 1 different answers"):
        mislabelled(samples[:1], 0.2, [0])


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=90),
    batch=st.integers(1, 9),
    group=st.integers(1, 4),
    seed=st.integers(0, 5),
)
def test_an_epoch_holds_every_sample_once_but_for_a_tail_shorter_than_a_batch(lengths, batch, group, seed):
    batches = batches_of(lengths, batch, [seed], group)
    drawn = [k for b in batches for k in b]
    assert all(len(b) == batch for b in batches)
    assert len(drawn) == len(set(drawn)) == len(lengths) // batch * batch
    assert set(drawn) <= set(range(len(lengths)))
    assert batches == batches_of(lengths, batch, [seed], group)


def test_batches_are_of_like_length_and_in_no_order_of_length():
    lengths = np.random.default_rng(0).integers(1, 100, 640).tolist()
    batches = batches_of(lengths, 8, [1, 2])
    spread = np.mean([np.ptp([lengths[k] for k in b]) for b in batches])
    assert spread < 25 < np.mean([np.ptp(lengths[k : k + 8]) for k in range(0, 640, 8)])
    means = [np.mean([lengths[k] for k in b]) for b in batches]
    assert abs(np.corrcoef(means, range(80))[0, 1]) < 0.35
    assert batches != batches_of(lengths, 8, [1, 3])


def test_the_left_out_tail_is_left_out_by_chance_not_by_length():
    """Each of 12 samples is left out of 8 as often as any other, long ones too."""
    left = np.zeros(12)
    for seed in range(600):
        left[[k for k in range(12) if k not in {i for b in batches_of(range(12), 8, [seed]) for i in b}]] += 1
    assert left.sum() == 4 * 600
    assert np.abs(left / 600 - 1 / 3).max() < 0.09  # 4.7 standard errors
