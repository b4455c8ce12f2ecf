"""Training in pieces by DeepSpeed (two processes, gloo, CPU) against one process without it."""

import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from test_distributed import agree, in_one_and_two, paths, same  # noqa: F401 (a fixture)

from laid.errors import LaidError
from laid.training.zero3 import Zero3, require_deepspeed


@pytest.fixture(scope="module")
def both(micro, paths, tmp_path_factory):  # noqa: F811
    pytest.importorskip("deepspeed", reason='DeepSpeed is not installed: pip install "laid[zero3]"')
    if not shutil.which("c++"):
        pytest.skip("DeepSpeed compiles an extension, and there is no C++ compiler")
    with pytest.MonkeyPatch.context() as patch:
        # A lock left behind by a start that was killed would stop this one.
        patch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path_factory.mktemp("extensions")))
        yield made(micro, paths, tmp_path_factory.mktemp("zero3"))


def made(micro, paths, root):  # noqa: F811
    teacher_alone = {"lambda_sft": 0.0, "lambda_kl": 0.0, "gain": False}
    kinds = {
        "laid": ("laid", {"gradient_checkpointing": True}),
        "tied": ("kd", {"student": "tied"}),
        "lora": ("sft", {"per_device_batch": 1}),
        "vision": ("kd", {"train_vision": True, "gradient_checkpointing": True}),
        "bf16": ("laid", {"dtype": "bfloat16"}),
        "teacher_alone": ("laid", {"settings": teacher_alone, "gradient_checkpointing": True}),
        "one_to_two": ("laid", {}),
        "two_to_one": ("laid", {"stop": 2}),
    }
    return in_one_and_two(micro, paths, root, "zero3", kinds)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["laid", "tied", "lora", "vision", "teacher_alone", "one_to_two"])
def test_two_processes_train_as_one_does(both, name):
    agree(both[name], name)


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(both):
    (one, here), (two, there) = both["two_to_one"][1], both["two_to_one"][2]
    assert len(two) == 2 and not there.exists()
    same(one, both["one_to_two"][2][0], 2e-4)
    assert (here / "model/model.safetensors").is_file()


@pytest.mark.slow
def test_bfloat16_agrees_to_its_own_precision(both):
    (one, _), (two, _) = both["bf16"][1], both["bf16"][2]
    same(one, two, 0.05)


def test_weights_that_do_not_divide_are_padded_and_the_padding_is_no_gradient():
    whole = torch.arange(1.0, 8).view(7, 1)
    weight = SimpleNamespace(partition_numel=lambda: 3, ds_numel=7, ds_tensor=torch.zeros(3))
    place, found = object.__new__(Zero3), []
    for place.rank in range(4):
        piece = place._cut(weight, whole)
        found += place._filled(weight, piece + 0).tolist()
        assert len(piece) == 3 and piece[len(place._filled(weight, piece)) :].eq(0).all()
    assert found == whole.flatten().tolist()


def test_without_deepspeed_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(LaidError, match=r"DeepSpeed is asked for, but not installed: pip install .*fsdp2"):
        require_deepspeed()
