"""What equation 7 can reach: students made of known mixtures, brute force over all tokens, and the verb."""

import shutil

import numpy as np
import pytest
import scipy.stats
import torch

from laid.analysis import alignability
from laid.analysis.alignability import KINDS, Moments, Reader, explained, layer_pairs, measure
from laid.cli import main
from laid.data.chat import of_question
from laid.data.coco import load_coco
from laid.data.questions import read_questions, write_questions
from laid.errors import LaidError
from laid.io import read_json
from laid.models.capture import QKCapture
from laid.models.decoder import text_model
from laid.models.forward import collate, hidden_states
from laid.models.loading import load_model
from laid.settings import validate
from laid.toy.family import build_config, build_model, build_processor
from laid.training.samples import build_samples

HEADS, DIM, STUDENTS = 4, 6, 2
QUESTIONS = 12


def teacher_heads(seed):
    """QUESTIONS tensors (tokens, HEADS, DIM) of correlated heads with means that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(HEADS * DIM, HEADS * DIM, generator=generator)
    lengths = torch.randint(20, 30, (QUESTIONS,), generator=generator).tolist()
    return [(torch.randn(n, HEADS * DIM, generator=generator) @ mix + 3).view(n, HEADS, DIM) for n in lengths]


def shares_of(xs, ys, kinds=KINDS):
    """Fitted on every second question, measured on the others, as the verb does."""
    moments = Moments()
    for x, y in zip(xs[0::2], ys[0::2], strict=True):
        moments.add(x, y)
    fit = moments.fit(kinds)
    missed = [fit.missed(x, y) for x, y in zip(xs[1::2], ys[1::2], strict=True)]
    return explained([{k: v.numpy() for k, v in question.items()} for question in missed])


def rotated(x, angles):
    """Every head and frequency turned by an angle of its own; angles: (HEADS, DIM / 2)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], dim=-1)


def mixed(x, w):
    return torch.einsum("tjd,hj->thd", x, w) + 5 * torch.arange(
        DIM
    )  # and a constant, which no mixture has to explain


W = torch.randn(STUDENTS, HEADS, generator=torch.Generator().manual_seed(7))


def test_a_mixture_of_heads_is_reached_by_equation_7():
    xs = teacher_heads(0)
    found = shares_of(xs, [mixed(x, W) for x in xs])
    for kind in KINDS:
        assert found[kind]["heads"] == pytest.approx([1, 1], abs=1e-4) and found[kind][
            "share"
        ] == pytest.approx(1, abs=1e-4)
        assert found[kind]["interval"] == pytest.approx([1, 1], abs=1e-4)


def test_heads_turned_by_frequency_are_reached_by_complex_weights_alone():
    xs = teacher_heads(1)
    angles = 2 * np.pi * torch.rand(HEADS, DIM // 2, generator=torch.Generator().manual_seed(2))
    found = shares_of(xs, [mixed(rotated(x, angles), W) for x in xs])
    assert found["complex"]["share"] == pytest.approx(1, abs=1e-4)
    assert found["linear"]["share"] == pytest.approx(1, abs=1e-4)
    assert max(found["real"]["heads"]) < 0.8


def test_any_map_of_the_teachers_dims_is_reached_by_a_linear_map_alone():
    xs = teacher_heads(3)
    basis = torch.randn(HEADS * DIM, STUDENTS * DIM, generator=torch.Generator().manual_seed(4))
    found = shares_of(xs, [(x.flatten(1) @ basis).view(-1, STUDENTS, DIM) for x in xs])
    assert found["linear"]["share"] == pytest.approx(1, abs=1e-4)
    assert found["real"]["share"] < found["complex"]["share"] < 0.9


def test_a_student_of_its_own_is_not_reached():
    xs = [torch.cat([x] * 20) + torch.randn(len(x) * 20, HEADS, DIM) for x in teacher_heads(5)]
    generator = torch.Generator().manual_seed(6)
    ys = [torch.randn(len(x), STUDENTS, DIM, generator=generator) for x in xs]
    found = shares_of(xs, ys)
    for kind in KINDS:
        assert abs(found[kind]["share"]) < 0.02
    assert found["constant"]["share"] == pytest.approx(0, abs=0.01)


def test_equals_least_squares_over_all_tokens(monkeypatch):
    """Design matrices with a column of ones, numpy's lstsq, one head and one frequency at a time."""
    monkeypatch.setattr(alignability, "RIDGE", 0.0)
    xs = teacher_heads(8)
    generator = torch.Generator().manual_seed(9)
    noise = [torch.randn(len(x), STUDENTS, DIM, generator=generator) for x in xs]
    ys = [mixed(x + x.roll(1, -1), W) + 2 * n for x, n in zip(xs, noise, strict=True)]
    found = shares_of(xs, ys)
    fit_x, fit_y, new_x, new_y = (
        torch.cat(parts).double().numpy() for parts in (xs[0::2], ys[0::2], xs[1::2], ys[1::2])
    )

    def predicted(a, b, design):
        """From design (n, unknowns) with a column of ones."""
        ones = [np.column_stack([np.ones(len(m)), m]) for m in (a, design)]
        return ones[1] @ np.linalg.lstsq(ones[0], b, rcond=None)[0]

    half = DIM // 2
    for h in range(STUDENTS):
        y, goal = fit_y[:, h], new_y[:, h]
        whole = ((goal - y.mean(0)) ** 2).sum()
        # eq. 7: one row per token and dim, a constant per dim
        rows = np.concatenate(
            [np.column_stack([np.eye(DIM)[[d] * len(y)], fit_x[:, :, d]]) for d in range(DIM)]
        )
        w = np.linalg.lstsq(rows, y.T.ravel(), rcond=None)[0]
        real = np.einsum("tjd,j->td", new_x, w[DIM:]) + w[:DIM]
        z, wanted, zx, new_zx = (m[..., :half] + 1j * m[..., half:] for m in (y, goal, fit_x, new_x))
        turned = np.column_stack([predicted(zx[..., f], z[:, f], new_zx[..., f]) for f in range(half)])
        linear = predicted(fit_x.reshape(len(y), -1), y, new_x.reshape(len(goal), -1))
        for kind, left in (("real", goal - real), ("complex", wanted - turned), ("linear", goal - linear)):
            assert found[kind]["heads"][h] == pytest.approx(1 - (abs(left) ** 2).sum() / whole, abs=2e-6), (
                kind
            )
        constant = 1 - whole / (goal**2).sum()
        assert found["constant"]["heads"][h] == pytest.approx(constant, abs=2e-6)
    assert 0.05 < found["real"]["share"] < found["complex"]["share"] < found["linear"]["share"] < 0.999


def test_the_interval_is_a_bootstrap_over_questions():
    rng = np.random.default_rng(0)
    whole = rng.uniform(1, 3, (40, 2))
    missed = [{"raw": 2 * a, "centred": a, "linear": a * rng.uniform(0.2, 0.6, 2)} for a in whole]
    found = explained(missed)
    assert found["real"] is None and found["complex"] is None
    assert found["constant"]["share"] == pytest.approx(0.5) and found["constant"]["interval"] == [0.5, 0.5]
    left = np.array([m["linear"].sum() for m in missed])
    wanted = scipy.stats.bootstrap(
        (left, whole.sum(1)), lambda a, b, axis: 1 - a.sum(axis) / b.sum(axis), paired=True,
        vectorized=True, method="percentile", random_state=0,
    ).confidence_interval  # fmt: skip
    assert found["linear"]["interval"] == pytest.approx(list(wanted), abs=0.005)
    assert found["linear"]["share"] == pytest.approx(1 - left.sum() / whole.sum(), abs=1e-6)


def test_every_student_layer_meets_the_teachers_of_its_depth_and_named_pairs_come_beside(micro):
    assert layer_pairs(micro, 2, 3) == {
        (0, 0): True,
        (1, 2): True,
    }  # micro's own pair, last to last, is one of them
    assert list(layer_pairs(micro, 5, 3)) == [(0, 0), (1, 0), (2, 1), (3, 2), (4, 2)]
    assert layer_pairs(micro, 1, 3) == {(0, 2): True}
    values = micro.model_dump()
    values["methods"]["laid"]["alignment"]["pairs"] = [[0, -1]]
    assert layer_pairs(validate(values), 2, 3) == {(0, 0): True, (0, 2): False, (1, 2): True}
    values["methods"]["laid"]["alignment"]["pairs"] = [[5, -1]]
    with pytest.raises(LaidError, match="layer 5 does not exist: the model has 2 layers"):
        layer_pairs(validate(values), 2, 3)


def test_a_reader_finds_the_questions_queries_and_the_images_keys(micro, family, haystacks, coco_root):
    reader = Reader(micro, family["small"], coco_root, "cpu")
    questions = read_questions(haystacks / "train.json")[:3]
    for sample in build_samples([of_question(q, 0) for q in questions], reader.features, ahead=False):
        found = reader.heads(sample, [1])
        tokenizer, ids = reader.features.processor.tokenizer, sample.prompt.ids
        asked = [at for at in range(len(ids) - 1) if at > np.flatnonzero(sample.prompt.image_mask)[-1] + 1]
        assert questions[sample.index].text in tokenizer.decode(ids[asked])
        inputs = collate([sample.prompt], reader.features.get(sample.paths))
        with torch.no_grad(), QKCapture(reader.model, 1) as capture:
            hidden_states(reader.model, inputs)
            qk = capture.take()[1]
        torch.testing.assert_close(found[1]["queries"], qk.q[0, :, asked].transpose(0, 1))
        images = np.flatnonzero(sample.prompt.image_mask)
        torch.testing.assert_close(found[1]["keys"], qk.k[0, :, images].transpose(0, 1))


def saved_as(folder, source, change):
    """A copy of a checkpoint with changed weights."""
    shutil.copytree(source, folder)
    model = load_model(source)
    with torch.no_grad():
        change(text_model(model))
    model.save_pretrained(folder)
    return folder


def share(record, layer, side, kind):
    (pair,) = [p for p in record["pairs"] if (p["layer"], p["teacher_layer"]) == (layer, layer)]
    return pair[side][kind]["share"]


def test_a_model_whose_first_layer_mixes_the_teachers_heads(micro, family, haystacks, coco_root, tmp_path):
    """Layer 0 sees embeddings alone: its queries are the teacher's, mixed by the weights that were put there."""
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    turn = 2 * np.pi * torch.rand(2, 8, generator=torch.Generator().manual_seed(2))

    def change(text):
        q, k = text.layers[0].self_attn.q_proj, text.layers[0].self_attn.k_proj
        q.weight.copy_(torch.einsum("hj,jdc->hdc", w, q.weight.view(4, 16, -1)).reshape(q.weight.shape))
        a, b = k.weight.view(2, 2, 8, -1).unbind(1)
        cos, sin = turn.cos()[..., None], turn.sin()[..., None]
        k.weight.copy_(torch.stack([a * cos - b * sin, a * sin + b * cos], 1).reshape(k.weight.shape))

    folder = saved_as(tmp_path / "mixed", family["teacher"], change)
    record = measure(micro, "mixed", folder, family["teacher"], coco_root, haystacks / "train.json")
    assert share(record, 0, "queries", "real") == pytest.approx(1, abs=1e-3)
    assert share(record, 0, "keys", "complex") == pytest.approx(1, abs=1e-3)
    assert share(record, 0, "keys", "real") < 0.9
    assert share(record, 2, "queries", "real") < 0.9
    assert record["questions"] == {"fitted": 12, "held_out": 12}
    itself = measure(micro, "self", family["teacher"], family["teacher"], coco_root, haystacks / "train.json")
    for layer in range(3):
        for side in ("queries", "keys"):
            assert share(itself, layer, side, "real") == pytest.approx(1, abs=1e-3)


def other_member(micro, coco_root, folder, head_dim=16, sections=(2, 3, 3), pixels=None, theta=None):
    """A student of another head_dim, or that sees images at another size."""
    family = micro.family.model_copy(update={"head_dim": head_dim, "mrope_section": list(sections)})
    member = family.members["small"].model_copy(update={"hidden_size": 2 * head_dim})
    processor = build_processor(load_coco(coco_root, "train2017").categories, pixels or family.image_pixels)
    config = build_config(processor, family, member)
    if theta:
        config.text_config.rope_parameters["rope_theta"] = theta
    build_model(config, seed=1).save_pretrained(folder)
    processor.save(folder)
    return folder


def test_where_heads_have_other_widths_or_frequencies(micro, family, haystacks, coco_root, tmp_path):
    questions = haystacks / "train.json"
    narrow = other_member(micro, coco_root, tmp_path / "narrow", 8, (1, 1, 2))
    for pair in measure(micro, "narrow", narrow, family["teacher"], coco_root, questions)["pairs"]:
        for side in ("queries", "keys"):
            assert pair[side]["real"] is None and pair[side]["complex"] is None
            assert len(pair[side]["linear"]["heads"]) == (2 if side == "queries" else 1)
    slow = other_member(micro, coco_root, tmp_path / "slow", theta=123.0)
    for pair in measure(micro, "slow", slow, family["teacher"], coco_root, questions)["pairs"]:
        assert pair["keys"]["complex"] is None and pair["keys"]["real"] and pair["keys"]["linear"]


def test_models_that_see_other_tokens_are_told(micro, family, haystacks, coco_root, tmp_path):
    large = other_member(micro, coco_root, tmp_path / "large", pixels=4 * micro.family.image_pixels)
    with pytest.raises(LaidError, match="teacher and student do not see the same tokens: question 0 has"):
        measure(micro, "large", large, family["teacher"], coco_root, haystacks / "train.json")


def test_one_question_cannot_be_halved(micro, family, haystacks, coco_root, tmp_path):
    write_questions(tmp_path / "one.json", read_questions(haystacks / "train.json")[:1])
    with pytest.raises(LaidError, match="one.json: 1 question to read, at least 2"):
        measure(micro, "small", family["small"], family["teacher"], coco_root, tmp_path / "one.json")


def test_verb_writes_the_same_record_twice_with_table_and_figure(
    family, haystacks, coco_root, micro_file, tmp_path, capsys
):
    words = f"alignability --config {micro_file} --teacher {family['teacher']} --student {family['small']}".split()
    words += f"--coco {coco_root} --questions {haystacks / 'train.json'} --device cpu".split()
    for folder in ("a", "b"):
        assert main([*words, "--out", str(tmp_path / folder)]) == 0
    names = {p.name for p in (tmp_path / "a").iterdir()}
    assert names == {f"small.{kind}" for kind in ("json", "cost.json", "md", "csv", "svg", "png")}
    for name in names - {"small.cost.json"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert "What equation 7 can reach of small" in capsys.readouterr().out
    record = read_json(tmp_path / "a/small.json")
    assert set(record["provenance"]["data"]) == {"student", "teacher", "questions"}
    assert len(record["pairs"]) == 2
    assert main([*words, "--student-name", "mine", "--out", str(tmp_path / "a")]) == 0
    assert read_json(tmp_path / "a/mine.json")["student"] == "mine"


def test_the_number_of_questions_is_a_setting(micro, family, haystacks, coco_root):
    few = validate({**micro.model_dump(), "analysis": {"alignment_questions": 5}})
    record = measure(few, "small", family["small"], family["teacher"], coco_root, haystacks / "train.json")
    assert record["questions"] == {"fitted": 3, "held_out": 2}
