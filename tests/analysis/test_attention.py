"""Attention shares against transformers' own attention output, and the record of `laid analyse`."""

import itertools

import numpy as np
import pytest
import torch

from laid.analysis import attention
from laid.analysis.spectrum import pairs, series
from laid.cli import main
from laid.data.questions import haystack_file, read_questions
from laid.errors import LaidError
from laid.evaluation.evaluate import Evaluator
from laid.io import read_json
from laid.methods.registry import load_with_method
from laid.models.decoder import text_model
from laid.models.forward import collate, embed


@pytest.fixture(scope="module")
def asked(micro, family, haystacks, coco_root):
    """(analysis, asked questions of five images) of the untrained student."""
    evaluator = Evaluator(load_with_method(micro, "base", family["small"], None), coco_root, micro.evaluation)
    questions = read_questions(haystack_file(haystacks / "test", 5))[:4]
    return attention.Analysis(evaluator), evaluator.ask(questions)


def eager(analysis, item):
    """Attention probabilities (layers, heads, tokens, tokens) as transformers' eager attention gives them."""
    text = text_model(analysis.model)
    inputs = collate([item.prompt], analysis.evaluator.features.get(item.paths))
    kept = text.config._attn_implementation
    text.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            output = text(
                inputs_embeds=embed(analysis.model, inputs),
                position_ids=inputs.positions,
                output_attentions=True,
            )
    finally:
        text.set_attn_implementation(kept)
    return torch.stack(output.attentions)[:, 0]


def test_rows_are_the_words_that_the_question_names(asked):
    analysis, items = asked
    for item in items:
        anchor, target, answer = attention.rows_of(item, analysis.tokenizer)
        ids = item.prompt.ids
        assert answer == len(ids) - 1 and anchor < target < answer
        said = analysis.tokenizer.decode(ids[: anchor + 1])
        assert said.endswith(item.question.anchor)
        said = analysis.tokenizer.decode(ids[: target + 1])
        assert said.endswith(item.question.target) and said.count("is there") == 1


def test_blocks_hold_the_delimiters_and_cover_all_images(asked):
    analysis, items = asked
    encoder = analysis.evaluator.processor.encoder
    for item in items:
        ends = []
        for image in range(5):
            block = item.prompt.ids[attention.block_of(item, image)]
            assert block[0] == encoder.start_id and block[-1] == encoder.end_id
            ends.append(attention.block_of(item, image))
        assert all(a.stop == b.start for a, b in itertools.pairwise(ends))


def test_needle_share_is_the_models_own_attention(asked):
    analysis, items = asked
    found = analysis.needles(items)
    share, uniform = np.zeros_like(found["share"]), np.zeros(3)
    for item in items:
        probabilities = eager(analysis, item)
        block = attention.block_of(item, item.needles[0])
        for r, row in enumerate(attention.rows_of(item, analysis.tokenizer)):
            share[:, :, r] += probabilities[:, :, row, block].sum(-1).numpy() / len(items)
            uniform[r] += (block.stop - block.start) / (row + 1) / len(items)
    np.testing.assert_allclose(found["share"], share, atol=1e-5)
    np.testing.assert_allclose(found["uniform"], uniform, atol=1e-9)
    assert (found["share"] < found["images"] + 1e-9).all() and (found["images"] < 1).all()
    assert found["share"].std() > 1e-3  # the heads differ: the test can fail
    assert np.all(found["key_norm"] > 0)


def test_coefficients_are_those_of_the_projections(asked):
    """C of layer 0 from its own weights: norm, q_proj and k_proj written out."""
    analysis, items = asked
    found, agreement = analysis.coefficients(items[:2])
    item = items[0]
    layer = text_model(analysis.model).layers[0]
    inputs = collate([item.prompt], analysis.evaluator.features.get(item.paths))
    with torch.no_grad():
        x = layer.input_layernorm(embed(analysis.model, inputs))[0]
        q = layer.self_attn.q_proj(x)[attention.block_of(item, 4).stop :].view(-1, 2, 16)
        k = layer.self_attn.k_proj(x)[torch.from_numpy(item.prompt.image_mask)]
    wanted = torch.stack(
        [(pairs(q[:, h])[:, None] * pairs(k)[None].conj()).mean((0, 1)) / 4 for h in range(2)]
    )
    np.testing.assert_allclose(found[0, 0], wanted.numpy(), atol=1e-5)
    assert agreement.shape == (2, 2) and np.nanmax(np.abs(agreement)) <= 1 + 1e-9
    assert np.isfinite(series(found.mean(0), analysis.theta, np.arange(5))).all()


def test_verb_writes_a_record_that_is_the_same_twice(
    family, haystacks, coco_root, micro_file, tmp_path, capsys
):
    words = [
        "analyse",
        "--config",
        str(micro_file),
        "--student-name",
        "small",
        "--model",
        str(family["small"]),
    ]
    words += ["--coco", str(coco_root), "--questions", str(haystacks / "test"), "--methods", "base", "yarn"]
    texts = []
    for name in ("small.json", "again.json"):
        assert main([*words, "--out", str(tmp_path / name), "--device", "cpu"]) == 0
        texts.append((tmp_path / name).read_bytes())
    assert texts[0] == texts[1] and "of the attention energy" in capsys.readouterr().out
    record = read_json(tmp_path / "small.json")
    assert record["sizes"] == [1, 2, 5] and record["questions"]["5"] == 10
    for method in ("base", "yarn"):
        part = record["methods"][method]["spectrum"]
        assert part["interval"][0] <= part["share"] <= part["interval"][1] and len(part["wavelengths"]) == 8
        assert part["size"] == 5
    one, other = (record["methods"][m]["needles"]["share"] for m in ("base", "yarn"))
    assert one != other


def test_a_trained_method_needs_its_run(family, haystacks, coco_root, micro_file, tmp_path, capsys):
    words = [
        "analyse",
        "--config",
        str(micro_file),
        "--student-name",
        "small",
        "--model",
        str(family["small"]),
    ]
    words += ["--coco", str(coco_root), "--questions", str(haystacks / "test"), "--methods", "laid"]
    assert main([*words, "--out", str(tmp_path / "x.json")]) == 2
    assert "method laid is trained: give its run folder" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_words_that_the_prompt_lacks_are_told(asked):
    from dataclasses import replace

    analysis, items = asked
    wrong = replace(items[0], question=replace(items[0].question, anchor="submarine"))
    with pytest.raises(LaidError, match="'submarine' are not found in its prompt"):
        attention.rows_of(wrong, analysis.tokenizer)
