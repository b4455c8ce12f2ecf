"""The examples of docs/examples run on the tiny family, and give the loss of `laid train`."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, TrainingArguments

import laid
from laid.data.chat import read_chats
from laid.training.teacher_cache import TeacherCache
from trainer_runs import Ready, changed

EXAMPLES = Path(__file__).resolve().parents[2] / "docs/examples"
STEADY = {"schedule": "constant", "warmup": 0.0, "epochs": 1, "max_grad_norm": 1e9, "lr": 0.003}


def example(name):
    file = EXAMPLES / name
    assert len(file.read_text().splitlines()) < 60
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_messages(chat):
    turns = []
    for turn in chat.turns:
        parts = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in turn.content]
        turns.append({"role": turn.role, "content": parts})
    return {"messages": turns, "images": list(chat.images)}


def write_chats(file, haystacks, two_turns):
    """The training questions as messages, some with longer answers, some with a second turn where wanted."""
    rows = []
    for k, chat in enumerate(read_chats(haystacks / "train.json")):
        row = as_messages(chat)
        if k % 3 == 1:
            row["messages"][-1]["content"] = [{"type": "text", "text": "yes there is a star in it"}]
        if k % 3 == 2 and two_turns:
            row["messages"] += [
                {"role": "user", "content": "Sure?"},
                {"role": "assistant", "content": "a circle"},
            ]
        rows.append(row)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def beside_laid_train(micro, family, start, haystacks, tmp_path):
    """compare(make, two_turns): the losses of `laid train` and of a trainer, by step and part, are the same.

    make: called with the student, the samples' file, their order, and what a trainer of transformers is given.
    """

    def compare(make, two_turns):
        chats = write_chats(tmp_path / "chats.jsonl", haystacks, two_turns)
        config = changed(micro, STEADY, "laid", gain=False, gaps={"reach": 0}, lr=0.003)
        paths = {"questions": chats, "teacher": family["teacher"], "teacher_cache": None}
        run = Ready(start(config, "laid", tmp_path / "seed0", **paths))
        order = run.data.order(0, 8)
        expected = [run.step(batch, at) for at, batch in enumerate(order)]

        student, teacher = (laid_model(family[name]) for name in ("small", "teacher"))
        student.model.visual.requires_grad_(False)
        method = config.methods["laid"]
        loss = laid.LaidLoss(
            student, teacher, lambda_laid=method.lambda_laid, lambda_kl=method.lambda_kl,
            lambda_sft=method.lambda_sft, temperature=method.temperature, distance_strength=method.distance.strength,
        )  # fmt: skip
        found = []
        loss.register_forward_hook(
            lambda _m, _a, parts: found.append({k: float(v.detach()) for k, v in parts.items()})
        )
        args = {
            "output_dir": str(tmp_path / "trainer"), "per_device_train_batch_size": 8, "max_steps": len(order),
            "learning_rate": 0.003, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True,
            "report_to": [], "save_strategy": "no", "train_sampling_strategy": "sequential", "disable_tqdm": True,
        }  # fmt: skip
        groups = [
            {"params": student.parameters()},
            {"params": loss.parameters(), "lr": config.training.lr_weights},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.003, weight_decay=0.0)
        optimizer.register_step_post_hook(lambda *_: loss.zero_grad())  # as the examples have it
        trainer = make(student, chats, [k for batch in order for k in batch], args, (optimizer, None))
        trainer.teacher, trainer.laid, trainer.model_accepts_loss_kwargs = teacher.eval(), loss, False
        trainer.train()
        assert len(found) == len(expected) == 3
        for ours, theirs in zip(expected, found, strict=True):
            for part in ("sft", "kl", "laid"):
                assert theirs[part] == pytest.approx(ours[f"loss_{part}"], rel=1e-3), part
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-3)
        assert expected[0]["loss"] != pytest.approx(expected[-1]["loss"], rel=1e-2)

    return compare


def test_laid_in_transformers_trainer_is_laid_train(beside_laid_train, family, coco_root):
    """Every part of the loss, at every step: the same samples in the same order, from the same weights."""
    module = example("trainer.py")

    def make(student, chats, order, args, optimizers):
        rows = [json.loads(line) for line in chats.read_text().splitlines()]
        collate = module.Collator(family["small"], coco_root)
        args = TrainingArguments(**args, remove_unused_columns=False)
        return module.LaidTrainer(student, args, collate, [rows[k] for k in order], optimizers=optimizers)

    beside_laid_train(make, two_turns=True)


def test_laid_in_trl_is_laid_train(beside_laid_train, family, coco_root):
    """The same where TRL is installed (envs/requirements-trl.lock; .ci/run does)."""
    trl = pytest.importorskip("trl")
    module = example("trl_sft.py")

    def make(student, chats, order, args, optimizers):
        rows = module.rows(str(chats), coco_root).select(order)
        args = trl.SFTConfig(**args, max_length=None, bf16=False)
        processor = AutoProcessor.from_pretrained(family["small"])
        return module.LaidTrainer(
            student, args, train_dataset=rows, processing_class=processor, optimizers=optimizers
        )

    beside_laid_train(make, two_turns=False)


def laid_model(folder):
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(folder)


def test_the_loss_from_a_cache_is_that_of_the_teacher_at_hand(family, haystacks, coco_root, cache):
    """Answers of one token, whose logits the cache keeps whole."""
    collate = example("trainer.py").Collator(family["small"], coco_root)
    rows = [as_messages(chat) for chat in read_chats(haystacks / "train.json")[:3]]
    batch = collate(rows)
    student, teacher, kept = laid_model(family["small"]), laid_model(family["teacher"]), TeacherCache(cache)
    found = []
    for source in (teacher, kept):
        loss = laid.LaidLoss(student, source)
        said = (
            source
            if source is teacher
            else kept.outputs([0, 1, 2], batch["labels"].shape[1], loss.teacher_layers)
        )
        found.append(loss(student, said, batch, 0.5))
    for part, value in found[0].items():
        torch.testing.assert_close(found[1][part], value, rtol=1e-3, atol=1e-5)
    batch["labels"][1] = -100
    with pytest.raises(laid.LaidError, match="a sample has no answer"):
        loss(student, teacher, batch)


def test_importing_laid_imports_nothing_heavy():
    code = "import sys, laid; assert 'torch' not in sys.modules; assert laid.__all__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    for name in laid.__all__:
        assert getattr(laid, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        laid.nonsense  # noqa: B018
