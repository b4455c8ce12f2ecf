import pytest
import torch

from laid.errors import LaidError
from laid.training.checkpoint import Checkpoint


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


def test_what_is_saved_is_what_goes_on(tmp_path):
    whole = parameters_()
    optimizer = optimizer_of(whole)
    for seed in range(5):
        step(whole, optimizer, seed)
    half = parameters_()
    optimizer = optimizer_of(half)
    for seed in range(3):
        step(half, optimizer, seed)
    checkpoint = Checkpoint(tmp_path / "c", "key", 1)
    checkpoint.save(3, {str(k): p.detach() for k, p in enumerate(half)}, optimizer, [{"loss": 0.1}])
    fresh = [torch.nn.Parameter(torch.zeros_like(p)) for p in half]
    optimizer = optimizer_of(fresh)
    done, weights, log = Checkpoint(tmp_path / "c", "key", 1).load(optimizer)
    assert (done, log) == (3, [{"loss": 0.1}])
    with torch.no_grad():
        for k, p in enumerate(fresh):
            p.copy_(weights[str(k)])
    for seed in (3, 4):
        step(fresh, optimizer, seed)
    for a, b in zip(whole, fresh):
        assert torch.equal(a, b)


def test_another_runs_checkpoint_is_not_taken_up(tmp_path):
    optimizer = optimizer_of(parameters_())
    assert Checkpoint(tmp_path / "c", "key", 1).load(optimizer) is None
    Checkpoint(tmp_path / "c", "key", 1).save(1, {"w": torch.ones(2)}, optimizer, [])
    assert Checkpoint(tmp_path / "c", "other", 1).load(optimizer) is None
    assert Checkpoint(tmp_path / "c", "key", 1).load(optimizer)[0] == 1


def test_a_broken_checkpoint_is_one_line(tmp_path):
    optimizer = optimizer_of(parameters_())
    checkpoint = Checkpoint(tmp_path / "c", "key", 1)
    checkpoint.save(1, {"w": torch.ones(200)}, optimizer, [])
    state = tmp_path / "c/state.safetensors"
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(LaidError, match="broken checkpoint .*; remove it to start again") as caught:
        checkpoint.load(optimizer)
    assert "\n" not in str(caught.value)
    (tmp_path / "c/state.json").write_text('{"key": ')
    with pytest.raises(LaidError, match="not valid JSON"):
        checkpoint.load(optimizer)
    checkpoint.remove()
    assert not (tmp_path / "c").exists()


def test_saving_anew_replaces_and_failing_keeps(tmp_path, monkeypatch):
    optimizer = optimizer_of(parameters_())
    checkpoint = Checkpoint(tmp_path / "c", "key", 1)
    checkpoint.save(1, {"w": torch.ones(2)}, optimizer, [])
    checkpoint.save(2, {"w": torch.zeros(2)}, optimizer, [])
    monkeypatch.setattr("laid.training.checkpoint.write_json", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoint.save(3, {"w": torch.ones(2)}, optimizer, [])
    done, weights, _ = checkpoint.load(optimizer)
    assert done == 2 and weights["w"].tolist() == [0, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_due(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("laid.training.checkpoint.time.monotonic", lambda: clock[0])
    checkpoint, never = (Checkpoint("x", "key", minutes) for minutes in (2, 0))
    assert not checkpoint.due()
    clock[0] += 120
    assert checkpoint.due() and not never.due()
