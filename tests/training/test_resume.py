"""Runs that are killed and started again, against runs that were not."""

import os
import signal

import pytest

from trainer_runs import bytes_of, changed


class Boom(Exception):
    pass


def interrupt(trainer, step, action):
    """Let `action` happen after `step` steps."""
    real, count = trainer._step, [0]

    def stepping(indices, at):
        if count[0] == step:
            action()
        count[0] += 1
        return real(indices, at)

    trainer._step = stepping


def boom():
    raise Boom


def sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(
    "method, steps, action, error",
    [
        ("laid", 2, sigterm, SystemExit),
        ("laid_wo_kl", 3, boom, Boom),
        ("sft", 4, boom, Boom),  # dropout goes on where it was
        ("sft", 5, sigterm, SystemExit),  # in the very last step
        ("kd", 1, sigterm, SystemExit),
    ],
)
def test_resumed_is_uninterrupted_bit_for_bit(micro, start, runs, tmp_path, method, steps, action, error):
    # The same run twice, the second time killed once and started again, saving after every step.
    whole = start(changed(micro, {"checkpoint_minutes": 1e-9}), method, tmp_path / "a/seed0")
    whole.train()
    config, out = (
        changed(micro, {"checkpoint_minutes": 1e-9 if action is boom else 1e9}),
        tmp_path / "b/seed0",
    )
    handler = signal.getsignal(signal.SIGTERM)
    killed = start(config, method, out)
    interrupt(killed, steps, action)
    with pytest.raises(error):
        killed.train()
    assert signal.getsignal(signal.SIGTERM) == handler
    assert not out.exists() and (tmp_path / "b/.seed0.checkpoint/state.json").is_file()
    resumed = start(config, method, out)
    done = []
    real = resumed._step
    resumed._step = lambda indices, at: done.append(at) or real(indices, at)
    resumed.train()
    first = steps + (action is sigterm)  # a step that a signal falls into is finished and saved
    assert done == list(range(first, 6))
    ours, theirs = bytes_of(out), bytes_of(tmp_path / "a/seed0")
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name] == theirs[name], name
    assert {p.name for p in out.parent.iterdir()} == {"seed0", "seed0.cost.json"}


def test_a_checkpoint_of_another_run_is_not_taken_up(micro, start, tmp_path):
    config, out = changed(micro, {"checkpoint_minutes": 1e-9}), tmp_path / "seed0"
    killed = start(config, "kd", out)
    interrupt(killed, 3, boom)
    with pytest.raises(Boom):
        killed.train()
    other = start(changed(config, {"lr_weights": 0.5}), "kd", out)
    steps = []
    real = other._step
    other._step = lambda indices, at: steps.append(at) or real(indices, at)
    other.train()
    assert steps == list(range(6))
