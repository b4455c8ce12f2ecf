"""Rehearsed bytes and FLOPs against measured ones: the same code with real tensors, watched by torch's own tools."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from laid.analysis.inference_cost import COUNTED
from laid.distill.distillation import TeacherOutputs
from laid.models.attention import cache_for
from laid.models.decoder import geometry
from laid.models.forward import last_logits
from laid.plan import steps
from laid.plan.measure import peak_bytes
from laid.plan.shapes import meta_model, published_config
from laid.settings import TrainedMethod
from laid.settings.training import Training
from laid.training.student import compute_in, make_trainable
from laid.training.teacher import teacher_outputs
from trainer_runs import Losses

TOKENS, VISUAL = 512, 400
# Without bfloat16 instructions a processor takes 25 times as long in it: fewer tokens there.
FEW = {"float32": (TOKENS, VISUAL), "bfloat16": (96, 70)}
METHODS = {
    "sft": {},
    "lora": {"lora": {"rank": 4}},
    "laid": {
        "lambda_kl": 1.0,
        "lambda_laid": 0.3,
        "distance": {"strength": 4.0},
        "gain": True,
    },
    "dilution": {"lambda_kl": 1.0, "dilution": {"reach": 300}},
}


@pytest.fixture(scope="module")
def student():
    """A decoder of four layers, 128 wide, whose heads each have their own keys, as fused attention on the CPU wants them."""
    return shrunk(hidden=128, layers=4, heads=4, kv=4, mlp=256)


@pytest.fixture(scope="module")
def teacher():
    return shrunk(hidden=256, layers=2, heads=8, kv=4, mlp=256)


def shrunk(hidden, layers, heads, kv, mlp, words=512):
    config = published_config("Qwen/Qwen2.5-VL-7B-Instruct")
    text, vision = config.get_text_config(), config.vision_config
    text.hidden_size, text.num_hidden_layers, text.num_attention_heads = hidden, layers, heads
    text.num_key_value_heads, text.intermediate_size, text.vocab_size = kv, mlp, words
    text.eos_token_id = text.pad_token_id = 0
    text.layer_types = text.layer_types[:layers]
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 96, 4
    vision.out_hidden_size, vision.fullatt_block_indexes = hidden, [1]
    return config


def flops(work):
    """(matrix products, attention) FLOPs of work() as torch counts them, attention as if nothing were causal."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        work()
    by_op = counter.get_flop_counts()["Global"]
    attention = sum(v for op, v in by_op.items() if "scaled_dot_product" in str(op))
    return sum(by_op.values()) - attention, attention


class FixedTeacher:
    """Gives the same real tensors every time."""

    def __init__(self, config, batch):
        g = geometry(config)
        self.heads, self.kv_heads, self.head_dim, self.depth = g.heads, g.kv_heads, g.head_dim, g.layers
        self.batch, self.words = batch, config.get_text_config().vocab_size

    def outputs(self, indices, tokens, layers, logits=True):
        def of(heads):
            return torch.randn(self.batch, heads, tokens, self.head_dim)

        words = torch.randn(self.batch, 2, self.words) if logits else None
        return TeacherOutputs(words, {layer: (of(self.heads), of(self.kv_heads)) for layer in layers})


def settings(checkpointing, pieces=4, **more):
    return Training(per_device_batch=2, batch_size=2 * pieces, gradient_checkpointing=checkpointing, **more)


@pytest.mark.parametrize(
    ("name", "checkpointing", "dtype"),
    [
        *((name, *how) for name in METHODS for how in ((False, "float32"), (True, "bfloat16"))),
        ("laid", True, "float32"),
        ("laid", False, "bfloat16"),
    ],
)
def test_training_step(student, teacher, name, checkpointing, dtype):
    """Peak memory and FLOPs of a real forward and backward pass, gradients of an earlier one in place.

    bfloat16: under autocast, over weights of which the trained ones are float32.
    """
    method, number = TrainedMethod(**METHODS[name]), getattr(torch, dtype)
    training = settings(checkpointing, dtype=dtype)
    model = make_trainable(meta_model(student, dtype, device="cpu"), method.lora, training).train()
    losses = Losses(model, method, FixedTeacher(teacher, 2))
    compute_in(losses.lesson.student, number, "cpu")
    tokens, visual = FEW[dtype]
    inputs = steps.meta_batch(student, 2, tokens, visual, number, "cpu")
    inputs.ids.random_(1, 500)
    if method.dilution.reach:
        inputs.score_bias = torch.rand(2, tokens)
    labels = torch.ones(2, 2, dtype=torch.long)

    def step():
        losses(inputs, labels, [0, 1], 0.5)

    step()
    linear, attention = flops(step)
    cost = steps.training_step(student, teacher, method, training, tokens, visual)
    assert cost.linear == pytest.approx(linear, rel=0.01)
    # causal: half of what torch counts; with a mask a kernel goes through all of it
    causal = 1 if method.dilution.reach else 0.5
    assert cost.attention == pytest.approx(causal * attention, rel=0.01)
    # What stands there all the time is known to the byte: trained weights in float32, AdamW's two moments.
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    learned = sum(p.numel() for m in losses.lesson.learned.values() for p in m.parameters())
    standing = {"weights": weights, "gradients": 4 * trained, "optimizer": 8 * (trained + learned)}
    found = {part: cost.peak[part] for part in standing}
    if (
        dtype == "bfloat16"
    ):  # and what autocast computes with, as many of those copies as stand at the worst moment
        assert 0 <= found.pop("weights") - weights <= 2 * trained
    assert found.items() <= standing.items()
    given = sum(t.nbytes for t in (inputs.ids, inputs.positions, inputs.image_mask, inputs.features))
    assert cost.bytes - sum(standing.values()) - given == pytest.approx(peak_bytes(step), rel=0.15)
    assert cost.trained == trained + learned


@pytest.mark.parametrize(("checkpointing", "dtype"), [(False, "float32"), (True, "bfloat16")])
def test_training_step_with_the_vision_tower(student, teacher, checkpointing, dtype):
    """Six images of 8 x 8 merged tokens (in bfloat16 two of 4 x 4) in each of two samples, read in the step."""
    side, images = {"float32": (8, 6), "bfloat16": (4, 2)}[dtype]
    number = getattr(torch, dtype)
    tokens = FEW[dtype][0]
    method = TrainedMethod()
    training = settings(checkpointing, dtype=dtype, train_vision=True)
    wide = copy.deepcopy(student)
    vision = wide.vision_config
    vision.hidden_size, vision.num_heads, vision.intermediate_size, vision.depth = 320, 4, 855, 4
    vision.fullatt_block_indexes = [3]
    model = make_trainable(meta_model(wide, dtype, device="cpu"), None, training).train()
    losses = Losses(model, method)
    compute_in(losses.lesson.student, number, "cpu")
    visual = images * side * side
    inputs = steps.meta_batch(wide, 2, tokens, visual, number, "cpu")
    inputs.ids.random_(1, 500)
    grid = torch.tensor([[1, 2 * side, 2 * side]] * 2 * images)
    pixels = torch.randn(2 * images * 4 * side * side, 1176)
    inputs.features, inputs.images = None, (pixels, grid, torch.arange(2 * images))
    labels = torch.ones(2, 2, dtype=torch.long)

    def step():
        losses(inputs, labels, [0, 1], 0.5)

    step()
    cost = steps.training_step(wide, teacher, method, training, tokens, visual, images=images)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    standing = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) + 12 * trained
    given = sum(t.nbytes for t in (inputs.ids, inputs.positions, inputs.image_mask, pixels))
    assert cost.trained == trained
    assert cost.bytes - standing - given == pytest.approx(peak_bytes(step), rel=0.15)
    without = steps.training_step(
        wide, teacher, method, training.changed({"train_vision": False}), tokens, visual
    )
    assert cost.bytes > 1.5 * without.bytes and cost.linear == without.linear


@pytest.mark.parametrize("chunk", [0, 96])
def test_reading(student, chunk):
    """A prompt read whole or in chunks, its keys and values kept."""
    model = meta_model(student, "float32", device="cpu")
    inputs = steps.meta_batch(student, 2, TOKENS, VISUAL, torch.float32, "cpu")

    @torch.no_grad()
    def read(chunk=chunk):
        last_logits(model, inputs, chunk, cache_for(TOKENS))

    read()
    linear, attention = flops(lambda: read(0))
    cost = steps.reading(student, "float32", 2, TOKENS, VISUAL, chunk, keep=True)
    assert cost.linear == pytest.approx(linear, rel=0.01)
    assert cost.attention == pytest.approx(attention / 2, rel=0.01)  # causal, in chunks too
    text = student.get_text_config()
    kept = (
        2 * 4 * text.num_hidden_layers * text.hidden_size * 2 * TOKENS
    )  # keys, values; float32; two prompts
    assert cost.peak["cache"] == kept
    given = sum(t.nbytes for t in (inputs.ids, inputs.positions, inputs.image_mask, inputs.features))
    assert cost.bytes - cost.peak["weights"] - given == pytest.approx(peak_bytes(read), rel=0.15)


def test_teacher_pass(teacher):
    model = meta_model(teacher, "float32", device="cpu")
    inputs = steps.meta_batch(teacher, 2, TOKENS, VISUAL, torch.float32, "cpu")

    def one_pass():
        logits, caught = teacher_outputs(model, inputs, (1,))
        for qk in caught.values():
            qk.q.transpose(1, 2).flatten(2).to(torch.bfloat16, copy=True)
        del logits

    one_pass()
    linear, _ = flops(one_pass)
    cost = steps.teacher_pass(teacher, [-1], "float32", 2, TOKENS, VISUAL)
    given = sum(t.nbytes for t in (inputs.ids, inputs.positions, inputs.image_mask, inputs.features))
    assert cost.linear == pytest.approx(linear, rel=0.01)
    assert cost.bytes - cost.peak["weights"] - given == pytest.approx(peak_bytes(one_pass), rel=0.15)


@pytest.mark.parametrize("what", ["step", "autocast", "words", "sharded", "teacher", "read"])
def test_depth_is_extrapolated_to_the_byte(student, teacher, what, monkeypatch):
    """Eight layers from four and six, against all eight rehearsed.

    words: so many that few layers are the most at their gradient, more layers at the end of the forward pass.
    """
    deep, layers = copy.deepcopy(student), 16 if what == "words" else 8
    text = deep.get_text_config()
    text.num_hidden_layers, text.layer_types = layers, [text.layer_types[0]] * layers
    if what == "words":
        text.vocab_size = 4096
    method = TrainedMethod(**METHODS["laid"] | {"alignment": {"pairs": [[7, -1], [0, 0]]}})

    def rehearse():
        if what == "step":
            return steps.training_step(deep, teacher, method, settings(True), TOKENS, VISUAL)
        if what in ("autocast", "sharded"):
            low, sharded = settings(True, dtype="bfloat16"), what == "sharded"
            return steps.training_step(deep, teacher, method, low, TOKENS, VISUAL, sharded=sharded)
        if what == "words":
            low = settings(True, dtype="bfloat16")
            return steps.training_step(deep, teacher, TrainedMethod(), low, *FEW["bfloat16"])
        if what == "teacher":
            return steps.teacher_pass(deep, [7], "bfloat16", 2, TOKENS, VISUAL)
        return steps.reading(deep, "bfloat16", 2, TOKENS, VISUAL, 200, keep=True)

    quick = rehearse()
    monkeypatch.setattr(steps, "DEPTHS", (4, 99))
    whole = rehearse()
    assert quick.peak == whole.peak and quick.bytes > 0
    assert (quick.flops, quick.trained) == (whole.flops, whole.trained)


def test_flops_by_hand(teacher):
    """The 7B model over 1,000 tokens: 2 per weight and token, 2 T^2 per head dimension and layer for causal attention."""
    config = published_config("Qwen/Qwen2.5-VL-7B-Instruct")
    tokens = 1000
    cost = steps.reading(config, "bfloat16", 1, tokens, 900, 0, keep=False)
    layer = 3584 * (3584 + 2 * 512) + 3584 * 3584 + 3 * 3584 * 18944
    assert cost.linear == 2 * tokens * 28 * layer + 2 * 152064 * 3584  # logits of the last token alone
    assert cost.attention == 28 * 28 * 128 * 2 * tokens**2
    keys = steps.reading(config, "bfloat16", 1, tokens, 900, 0, keep=True).peak["cache"]
    assert keys == 2 * 28 * 4 * 128 * 2 * tokens


def test_a_longer_prompt_costs_more_memory_and_a_checkpoint_less(student, teacher):
    def peak(tokens, checkpointing):
        training = settings(checkpointing)
        return steps.training_step(student, teacher, TrainedMethod(), training, tokens, tokens - 50).bytes

    assert peak(4000, True) < peak(8000, True) < peak(8000, False)
