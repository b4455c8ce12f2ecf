"""No tensor of tokens x tokens, and logits only where there are labels: every tensor that an operation makes is looked at."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from laid.distill.distillation import ROWS
from laid.methods.self_extend import apply_self_extend
from laid.models.forward import Batch, hidden_states, last_logits
from laid.settings import TrainedMethod
from laid.training.teacher import OnlineTeacher
from tiny_vlm import IMAGE, prompt, tiny_model
from trainer_runs import Losses

WORDS = 77  # no other size of the models is a multiple of it
LAID = {
    "lambda_kl": 1.0,
    "lambda_laid": 0.3,
    "alignment": {"pairs": [[0, 0], [-1, -1]]},
    "distance": {"strength": 4.0},
    "gain": True,
}


class Watch(TorchDispatchMode):
    """The sizes of all tensors that are made meanwhile, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {x.shape for x in tree_iter(out) if isinstance(x, torch.Tensor)}
        return out

    def largest(self):
        return max(shape.numel() for shape in self.shapes)

    def squares(self, tokens):
        """In which tokens may meet tokens, however they are laid out."""
        return [shape for shape in self.shapes if shape.numel() >= tokens**2]

    def logits(self):
        """The most rows of logits in one tensor."""
        return max(shape.numel() // WORDS for shape in self.shapes if WORDS in shape[-1:])


def batch_of(model, images):
    """One prompt of `images` images of 4 visual tokens, the same for a student and a teacher."""
    ids, positions, _ = prompt(model, grids=((4, 4),) * images, tail=6)
    mask = ids == IMAGE
    features = torch.randn(int(mask.sum()), model.config.get_text_config().hidden_size)
    return Batch(ids, positions, torch.tensor([ids.shape[1]]), mask, features)


def a_step(settings, images):
    """(what a training step makes, tokens): forward, losses, backward, AdamW."""
    student = tiny_model(vocab_size=WORDS)
    teacher = tiny_model(seed=1, heads=8, hidden=64, vocab_size=WORDS).requires_grad_(False)
    settings = TrainedMethod().changed(settings)
    losses = Losses(student, settings, OnlineTeacher(teacher, lambda _: batch_of(teacher, images)))
    optimizer = torch.optim.AdamW(student.parameters())
    inputs, labels = batch_of(student, images), torch.tensor([[7, 8]])
    with Watch() as watch:
        losses(inputs, labels, [0], 0.5)
        optimizer.step()
    return watch, inputs.ids.shape[1]


@pytest.mark.parametrize(
    "settings",
    [{}, {"lambda_kl": 1.0}, LAID],
    ids=["sft", "kd", "laid"],
)
def test_a_step_grows_with_tokens_not_with_their_square(settings):
    (short, few), (long, many) = a_step(settings, 50), a_step(settings, 100)
    assert few > 300 and not short.squares(few) and not long.squares(many)
    assert long.largest() <= 1.02 * many / few * short.largest()
    assert short.logits() == long.logits() <= 64  # that of the teacher's transposed embedding; logits have 2


def test_a_long_answer_makes_the_logits_of_a_chunk_at_a_time():
    """Student and teacher, forward and backward, whatever the number of answer tokens."""
    student = tiny_model(vocab_size=WORDS)
    teacher = tiny_model(seed=1, heads=8, hidden=64, vocab_size=WORDS).requires_grad_(False)

    def long(model):
        inputs = batch_of(model, 60)
        count = inputs.ids.shape[1]
        return replace(inputs, answers=(torch.zeros(300, dtype=torch.long), torch.arange(count - 300, count)))

    losses = Losses(student, TrainedMethod().changed(LAID), OnlineTeacher(teacher, lambda _: long(teacher)))
    with Watch() as watch:
        losses(long(student), torch.arange(300)[None] % WORDS, [0], 0.5)
    assert watch.logits() == ROWS


@torch.no_grad()
def test_answering_makes_no_square_and_one_row_of_logits():
    model = tiny_model(vocab_size=WORDS)
    inputs = batch_of(model, 60)
    tokens = inputs.ids.shape[1]
    for chunk in (0, 128):
        with Watch() as watch:
            last_logits(model, inputs, chunk)
        # pieces see a mask of their rows x all tokens, the whole prompt none
        assert not watch.squares(tokens) and watch.logits() <= 32
    for backend in ("blocks", "flash"):
        with apply_self_extend(model, 4, 32, backend=backend, block_elements=2**13), Watch() as watch:
            last_logits(model, inputs)
        assert not watch.squares(tokens)


def test_the_watch_sees_what_eager_attention_makes():
    model = tiny_model(vocab_size=WORDS)
    model.set_attn_implementation("eager")
    inputs = batch_of(model, 50)
    with Watch() as watch:
        model.get_output_embeddings()(hidden_states(model, inputs))
    assert watch.squares(inputs.ids.shape[1]) and watch.logits() == inputs.ids.shape[1]
