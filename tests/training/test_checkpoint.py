import json

import pytest
import torch

from laid.errors import LaidError
from laid.training.checkpoint import Checkpoint, State
from laid.training.engine import start


def optimizer_of(parameters):
    return torch.optim.AdamW(
        [{"params": [p], "lr": 0.1 * (k + 1)} for k, p in enumerate(parameters)], fused=True
    )


def parameters_():
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in ((3, 2), (4,), (2,))]


def step(parameters, optimizer, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in parameters[:2]:  # the third never has a gradient, and so no state
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()


def test_what_is_saved_is_what_goes_on(micro, tmp_path):
    engine = start(micro.training)
    whole = parameters_()
    optimizer = optimizer_of(whole)
    for seed in range(5):
        step(whole, optimizer, seed)
    half = parameters_()
    optimizer = optimizer_of(half)
    for seed in range(3):
        step(half, optimizer, seed)
    state = State(3, dict(engine.optimizer_tensors(optimizer)), [{"loss": 0.1}])
    state.tensors |= {f"w{k}": p for k, p in enumerate(half)}
    Checkpoint(tmp_path / "c", "key", 1).save(state)
    fresh = [torch.nn.Parameter(torch.zeros_like(p)) for p in half]
    optimizer = optimizer_of(fresh)
    found = Checkpoint(tmp_path / "c", "key", 1).load()
    assert (found.step, found.log) == (3, [{"loss": 0.1}])
    for k, p in enumerate(fresh):
        engine.set_(p, found.tensors.pop(f"w{k}"))
    engine.restore_optimizer(optimizer, found.tensors)
    for seed in (3, 4):
        step(fresh, optimizer, seed)
    for a, b in zip(whole, fresh):
        assert torch.equal(a, b)


def one(step, value, size=2):
    return State(step, {"w": torch.full((size,), float(value))}, [])


def test_another_runs_checkpoint_is_not_taken_up(tmp_path):
    assert Checkpoint(tmp_path / "c", "key", 1).load() is None
    Checkpoint(tmp_path / "c", "key", 1).save(one(1, 1))
    assert Checkpoint(tmp_path / "c", "other", 1).load() is None
    assert Checkpoint(tmp_path / "c", "key", 1).load().step == 1


def test_a_broken_or_changed_checkpoint_is_one_line(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c", "key", 1)
    checkpoint.save(one(1, 1, 200))
    file = tmp_path / "c/state.safetensors"
    whole = file.read_bytes()

    def refused(match):
        with pytest.raises(LaidError, match=match) as caught:
            checkpoint.load()
        assert "\n" not in str(caught.value)

    for content in (whole[:-9], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(content)
        refused("changed since it was written; remove .* to start again")
    file.unlink()
    refused("broken checkpoint .*; remove it to start again")
    file.write_bytes(whole)
    about = tmp_path / "c/state.json"
    said = json.loads(about.read_text())
    for content, match in (
        ('{"key": ', "state.json: not valid JSON"),
        ("[]", "state.json: the file: Input should be a valid dict.*: changed by hand"),
        (json.dumps(said | {"step": 2}), "changed since it was written"),
        (json.dumps(said | {"log": [{"loss": 0.5}]}), "changed since it was written"),
        (json.dumps(said | {"step": "1"}), "state.json: step: Input should be a valid integer"),
        (json.dumps({"key": "key"}), "state.json: step: Field required"),
    ):
        about.write_text(content)
        refused(match)
    checkpoint.remove()
    assert not (tmp_path / "c").exists()


def test_saving_anew_replaces_and_failing_keeps(tmp_path, monkeypatch):
    checkpoint = Checkpoint(tmp_path / "c", "key", 1)
    checkpoint.save(one(1, 1))
    checkpoint.save(one(2, 0))
    monkeypatch.setattr("laid.training.checkpoint.write_json", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(one(3, 1))
    found = checkpoint.load()
    assert found.step == 2 and found.tensors["w"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_due(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("laid.training.checkpoint.time.monotonic", lambda: clock[0])
    checkpoint, never = (Checkpoint("x", "key", minutes) for minutes in (2, 0))
    assert not checkpoint.due()
    clock[0] += 120
    assert checkpoint.due() and not never.due()
