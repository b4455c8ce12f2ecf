"""Answers of any length in training: what is learned where, in chunks, from a cache of the largest logits; and `laid distill`."""

import numpy as np
import pytest
import torch

from chats import write_chats
from laid.cli import main
from laid.data.chat import read_chats
from laid.distill import distillation
from laid.distill.kl import top_kl_error
from laid.errors import LaidError
from laid.io import read_json
from laid.models.loading import load_model
from laid.training import teacher_cache
from laid.training.teacher_cache import TeacherCache, build_cache, cache_size
from trainer_runs import CLOSE, Ready, changed


@pytest.fixture(scope="module")
def data(coco_root, tmp_path_factory):
    return write_chats(tmp_path_factory.mktemp("chats") / "train.jsonl", coco_root)


@pytest.fixture(scope="module")
def chat_cache(micro, family, coco_root, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("chats") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher_cache, "TOP", 5)
        build_cache(micro, family["teacher"], coco_root, data, out)
        told = cache_size(micro, family["teacher"], coco_root, data)
    return out, told


MIXED = [0, 1, 2, 3, 5]  # every kind; 1, 2, 3 and 5 have answers of several tokens


@pytest.fixture(scope="module")
def online(micro, start, family, data, tmp_path_factory):
    """A run under LAid with a teacher at hand."""
    out = tmp_path_factory.mktemp("online") / "seed0"
    config = changed(micro, {}, "laid", gaps={"reach": 0}, gain=False)
    return Ready(start(config, "laid", out, questions=data, teacher=family["teacher"], teacher_cache=None))


def whole(model, data, k):
    """(A, vocabulary) logits at a sample's answer tokens, by transformers' own forward."""
    sample = data.samples[k]
    ids = torch.from_numpy(sample.prompt.ids)[None]
    more = {}
    if sample.paths:
        pixels, grid = data.features.processor.pixels([data.features.file(p) for p in sample.paths])
        more = {"pixel_values": pixels, "image_grid_thw": grid}
    kinds = torch.from_numpy(sample.prompt.image_mask)[None].int()
    return model(input_ids=ids, mm_token_type_ids=kinds, **more).logits[0, sample.at]


def test_a_conversation_is_what_the_template_and_transformers_make_of_it(online, family, data):
    """Ids: the whole conversation rendered and tokenized in one go; labels: the answers and the ends of their turns."""
    processor, model = online.data.features.processor, load_model(family["small"]).model
    tokenizer = processor.tokenizer
    for chat, sample in zip(read_chats(data), online.data.samples, strict=True):
        content = [
            [{"type": "image"} if part is None else {"type": "text", "text": part} for part in turn.content]
            for turn in chat.turns
        ]
        rendered = tokenizer.apply_chat_template(
            [{"role": t.role, "content": c} for t, c in zip(chat.turns, content)], tokenize=False
        )
        grids = online.data.features.grids(sample.paths)
        for height, width in grids:
            rendered = rendered.replace("<|image_pad|>", "<pad>" * (height * width), 1)
        ids = tokenizer(rendered.replace("<pad>", "<|image_pad|>"), add_special_tokens=False)["input_ids"]
        count = len(sample.prompt.ids)
        assert ids[:count] == sample.prompt.ids.tolist() and tokenizer.decode(ids[count:]) == "<|im_end|>\n"
        assert (np.array(ids)[sample.at + 1] == sample.labels).all()
        answers = "".join(turn.text + "<|im_end|>" for turn in chat.turns if turn.role == "assistant")
        assert tokenizer.decode(sample.labels) == answers
        assert tokenizer.decode(ids[sample.answer_at + 1 : count]) == chat.turns[-1].text
        ids = torch.tensor(ids[:count])[None]
        grid = torch.tensor([(1, 2 * h, 2 * w) for h, w in grids]) if grids else None
        kinds = (ids == processor.encoder.pad_id).int()
        positions = model.get_rope_index(ids, kinds, image_grid_thw=grid)[0][:, 0]
        assert torch.equal(positions, torch.from_numpy(sample.prompt.positions))


@pytest.mark.parametrize("rows", [3, 128])
def test_losses_of_every_answer_token_by_hand_whole_and_in_chunks(online, family, rows, monkeypatch):
    monkeypatch.setattr(distillation, "ROWS", rows)
    tau = online.lesson.distillation.method.temperature
    sft, kl = [], []
    teacher = load_model(family["teacher"])
    with torch.no_grad():
        for k in MIXED:
            own, theirs = (whole(m, online.data, k) for m in (online.model, teacher))
            labels = torch.from_numpy(online.data.samples[k].labels)
            sft.append(torch.nn.functional.cross_entropy(own, labels, reduction="none"))
            p, q = ((x / tau).softmax(-1) for x in (theirs, own))
            kl.append(tau**2 * (p * (p / q).log()).sum(-1))
    online.model.zero_grad()
    parts = online.losses(MIXED)
    torch.testing.assert_close(parts["sft"], torch.cat(sft).mean(), **CLOSE)
    torch.testing.assert_close(parts["kl"], torch.cat(kl).mean(), **CLOSE)
    # of unlike pieces every answer token counts alike, as in the whole
    gradients = [p.grad.clone() for p in online.model.parameters() if p.grad is not None]
    online.model.zero_grad()
    for part in ([0, 1], [2, 3, 5]):
        piece = online.data.piece(part, 0, 6, MIXED)
        found = distillation_losses(online, piece)
        ((found["sft"] + 0.5 * found["kl"]) * (len(part) / len(MIXED))).backward()
    pieces = [p.grad.clone() for p in online.model.parameters() if p.grad is not None]
    online.model.zero_grad()
    found = distillation_losses(online, online.data.piece(MIXED, 0, 6))
    (found["sft"] + 0.5 * found["kl"]).backward()
    once = [p.grad for p in online.model.parameters() if p.grad is not None]
    assert len(pieces) == len(once) and len(gradients) >= len(once)
    for a, b in zip(pieces, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def distillation_losses(ready, piece):
    """SFT and KL of a piece, with their graph, times its share."""
    taught = ready.lesson.teacher.outputs(piece.indices, piece.inputs.ids.shape[1], [2])
    words = ready.lesson.student(piece.inputs, piece.labels, taught).words
    return {name: loss * piece.share for name, loss in words.items()}


def test_the_cache_keeps_the_largest_logits_and_its_error_is_bounded(
    micro, start, data, chat_cache, online, tmp_path
):
    """Against the whole divergence at hand: never above it, short of it by less than the bound, exact where all is kept."""
    out, told = chat_cache
    config = changed(micro, {}, "kd")
    run = Ready(start(config, "kd", tmp_path / "seed0", questions=data, teacher_cache=out))
    tau, cache = micro.methods["kd"].temperature, TeacherCache(out, data)
    with torch.no_grad():
        for k, (answers, sample) in enumerate(zip(cache.answers, online.data.samples, strict=True)):
            full = online.lesson.teacher.outputs([k], len(sample.prompt.ids), [], True).said[0][1]
            ((_, kept),) = cache.outputs([k], len(sample.prompt.ids), []).said
            own, theirs = whole(run.model, run.data, k), full[:]
            exact = distillation.kl_rows(own.double(), theirs.double(), tau)
            if answers == 2:
                torch.testing.assert_close(kept, theirs, rtol=1e-4, atol=1e-4)
                continue
            short = exact - distillation.kl_rows(own, kept, tau)
            bound = top_kl_error(own, kept, tau)
            assert (short > -1e-5).all() and (short <= bound + 1e-5).all() and (short > 1e-3).any()
            values, ids = theirs.topk(5)
            assert torch.equal(kept.ids, ids)
            torch.testing.assert_close(kept.values, values, rtol=1e-4, atol=1e-4)
            outside = 1 - theirs.softmax(-1).gather(-1, ids).sum(-1)
            torch.testing.assert_close(kept.log_probabilities(1.0)[1].exp(), outside, rtol=1e-3, atol=1e-5)
        parts = run.losses(MIXED)
        assert 0 < parts["kl"] < online.losses(MIXED)["kl"] * 1.0001
    index = read_json(out / "index.json")
    assert 0 < index["top"]["outside"]["mean"] < index["top"]["outside"]["largest"] < 1
    assert f"{len(cache.lengths)} questions" in told
    logits, words = sum(n == 2 for n in cache.answers), index["top"]["words"]
    kilobytes = (8 * words * logits + sum(n for n in cache.answers if n != 2) * (8 * 5 + 4 * 2)) / 1e3
    assert f"{kilobytes:.1f} kB of logits" in told
    with pytest.raises(LaidError, match="kept for temperatures 1, 2, not 3: make the cache again"):
        cache.top([1]).log_probabilities(3.0)


def test_distill_takes_conversations_and_measures_answers(
    family, coco_root, data, micro_file, tmp_path, capsys
):
    """laid_plus: without needles its dilution is left out, and the record says so; dilution with needles stays."""
    held_out = write_chats(tmp_path / "held.jsonl", coco_root, 4, split="val2017")
    words = [
        "distill", "--config", str(micro_file), "--teacher", str(family["teacher"]), "--student", str(family["small"]),
        "--data", str(data), "--images", str(coco_root), "--device", "cpu", "--method", "laid_plus",
        "--eval", str(held_out), "--out", str(tmp_path / "mine"),
    ]  # fmt: skip
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "dilution needs to know" in said and "largest logits of each token" in said
    assert "log-likelihood of the given answers -" in said
    record = read_json(tmp_path / "mine/distill.json")
    assert record["settings"]["laid_plus"]["dilution"]["reach"] == 0 and record["questions"] == 16
    asked = sum(n for _, n in record["accuracy"]["after"].values())
    assert asked == 5  # of four conversations, one with two answers
    card = (tmp_path / "mine/model/README.md").read_text()
    assert "exact match of the given answer" in card and "Mean log-likelihood of a token" in card
    # the sum of log-likelihoods by hand
    from laid.models.processing import Processor
    from laid.training.data import read_data

    model = load_model(family["small"])
    read = read_data(
        model, Processor.load(family["small"]), held_out, coco_root, micro_eval(micro_file), micro_method(micro_file)
    )  # fmt: skip
    with torch.no_grad():
        total = sum(
            float(torch.log_softmax(whole(model, read, k), -1).gather(-1, torch.from_numpy(s.labels)[:, None]).sum())
            for k, s in enumerate(read.samples)
        )  # fmt: skip
    found = sum(v for v, _ in record["likelihood"]["before"].values())
    assert found == pytest.approx(total, rel=1e-4)


def micro_eval(file):
    from laid.settings import load

    return load([file]).evaluation


def micro_method(file):
    from laid.settings import load

    return load([file]).methods["kd"]
