"""Runs that are killed and started again, against runs that were not."""

import os
import signal

import pytest

from laid.training import recipe
from laid.training.recipe import train
from laid.training.step import training_step
from trainer_runs import bytes_of, changed


class Boom(Exception):
    pass


def watched(monkeypatch, at=None, action=None):
    """The steps that are made from now on; before that numbered `at`, `action` happens."""
    made = []

    def step(t, indices, number):
        if number == at and action:
            action()
        made.append(number)
        return training_step(t, indices, number)

    monkeypatch.setattr(recipe, "training_step", step)
    return made


def boom():
    raise Boom


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def sigint():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    "method, steps, action, error",
    [
        ("laid", 2, sigterm, SystemExit),
        ("laid_wo_kl", 3, boom, Boom),
        ("sft", 4, boom, Boom),  # dropout goes on where it was
        ("sft", 5, sigterm, SystemExit),  # in the very last step
        ("kd", 1, sigint, SystemExit),
        ("laid_plus", 3, boom, Boom),  # gaps and dilution are drawn as they would have been
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(
    micro, start, tmp_path, monkeypatch, capsys, method, steps, action, error
):
    # The same run twice, the second time killed once and started again, saving after every step.
    train(start(changed(micro, {"checkpoint_minutes": 1e-9}), method, tmp_path / "a/seed0"))
    config = changed(micro, {"checkpoint_minutes": 1e-9 if action is boom else 1e9})
    run, out = start(config, method, tmp_path / "b/seed0"), tmp_path / "b/seed0"
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    watched(monkeypatch, steps, action)
    with pytest.raises(error) as caught:
        train(run)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    if action is not boom:
        assert caught.value.code == {sigterm: 143, sigint: 130}[action]
        assert (
            f"stopped after step {steps + 1}; the same command goes on from there" in capsys.readouterr().out
        )
    assert not out.exists() and (tmp_path / "b/.seed0.checkpoint/state.json").is_file()
    done = watched(monkeypatch)
    train(run)
    first = steps + (action is not boom)  # a step that a signal falls into is finished and saved
    assert done == list(range(first, 6))
    ours, theirs = bytes_of(out), bytes_of(tmp_path / "a/seed0")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert {p.name for p in out.parent.iterdir()} == {"seed0", "seed0.cost.json"}


def test_a_second_interrupt_does_not_wait(micro, start, tmp_path, monkeypatch):
    watched(monkeypatch, 1, lambda: (sigint(), sigint()))
    with pytest.raises(KeyboardInterrupt):
        train(start(micro, "sft", tmp_path / "seed0"))


def test_a_checkpoint_of_another_run_is_not_taken_up(micro, start, tmp_path, monkeypatch):
    config, out = changed(micro, {"checkpoint_minutes": 1e-9}), tmp_path / "seed0"
    watched(monkeypatch, 3, boom)
    with pytest.raises(Boom):
        train(start(config, "kd", out))
    steps = watched(monkeypatch)
    train(start(changed(config, {"lr_weights": 0.5}), "kd", out))
    assert steps == list(range(6))
