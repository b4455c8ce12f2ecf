"""Checkpoint folders with something wrong, as a user meets them: one line that names the file, and no traceback."""

import json
import logging
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

from laid import cli
from laid.errors import LaidError
from laid.models.features import ImageFeatures
from laid.models.loading import load_model
from laid.models.processing import Processor


@pytest.fixture(scope="module")
def sharded(family, tmp_path_factory):
    """The student in several weight files."""
    folder = tmp_path_factory.mktemp("sharded") / "member"
    shutil.copytree(family["small"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    load_model(family["small"]).save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


def both(folder):
    return ImageFeatures(load_model(folder), Processor.load(folder), lambda path: path)


def edit(file, **values):
    content = json.loads(file.read_text())
    for key, value in values.items():
        place, _, name = key.rpartition("__")
        (content[place] if place else content)[name] = value
    file.write_text(json.dumps(content))


def cut(file, count=50):
    file.write_bytes(file.read_bytes()[:-count])


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def fewer_rows(folder, weights=True):
    """A vocabulary of three rows less than the tokenizer has, in the config and, if said, in the weights."""
    rows = json.loads((folder / "config.json").read_text())["text_config"]["vocab_size"] - 3
    edit(folder / "config.json", text_config__vocab_size=rows)
    if weights:
        names = ("embed_tokens.weight", "lm_head.weight")
        found = load_file(folder / "model.safetensors")
        short = {n: w[:rows].clone() if n.endswith(names) else w for n, w in found.items()}
        save_file(short, folder / "model.safetensors", metadata={"format": "pt"})


def pointer(folder):
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    )


def cast(end, dtype):
    """The weights of that name in another format."""

    def spoil(folder):
        found = load_file(folder / "model.safetensors")
        found |= {name: w.to(dtype) for name, w in found.items() if name.endswith(end)}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})

    return spoil


def elsewhere(name):
    """The weights under another name, which the index gives; `name` is relative to the folder."""

    def spoil(folder):
        names = list(load_file(folder / "model.safetensors"))
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / "model.safetensors").rename(folder / name)
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, name)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    return spoil


def adapter(folder, alone=True):
    """An adapter's files; peft gives the name of a base that is not looked for."""
    said = {
        "peft_type": "LORA",
        "base_model_name_or_path": "owner/other",
        "target_modules": ["q_proj"],
        "r": 2,
    }
    (folder / "adapter_config.json").write_text(json.dumps(said))
    if alone:
        (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
        (folder / "config.json").unlink()


WRONG = {
    "an adapter": (adapter, r"holds an adapter alone: merge it into its base first \(peft"),
    "an adapter too": (lambda f: adapter(f, alone=False), "holds a model and an adapter_config.json"),
    "weights elsewhere": (elsewhere("../x.safetensors"), "names '../x.safetensors': weights must be .safetensors files in"),
    "weights below": (elsewhere("sub/x.safetensors"), "names 'sub/x.safetensors'"),
    "hidden weights": (elsewhere(".x.safetensors"), "names '.x.safetensors'"),
    "weights by another name": (
        lambda f: edit(f / "config.json", transformers_weights=".x.safetensors"), "config.json names weights of its own",
    ),
    "integer weights": (cast("q_proj.weight", torch.int32), "model.safetensors: model.*q_proj.weight is I32, weights are F16"),
    "bool weights": (cast("q_proj.weight", torch.bool), "is BOOL, weights are"),
    "complex weights": (cast("q_proj.weight", torch.complex64), "is C64, weights are"),
    "byte weights": (cast("lm_head.weight", torch.uint8), "lm_head.weight is U8, weights are"),
    "model type": (lambda f: edit(f / "config.json", model_type={}), "model_type '{}' is not supported; supported: qwen2_5_vl"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors: get the weights"),
    "pickle": (pickled, "no model.safetensors, only pytorch_model.bin, and pickled files are never opened"),
    "cut weights": (lambda f: cut(f / "model.safetensors"), r"model.safetensors: not a whole safetensors file \(.*\), [\d,]+ bytes"),
    "pointer": (pointer, "model.safetensors: a Git LFS pointer, not the weights, 64 bytes"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "no tokenizer.json in this folder"),
    "cut tokenizer": (lambda f: cut(f / "tokenizer.json"), "tokenizer.json: not valid JSON, line"),
    "no preprocessor": (lambda f: (f / "preprocessor_config.json").unlink(), "no preprocessor_config.json in this folder"),
    "cut preprocessor": (lambda f: cut(f / "preprocessor_config.json"), "preprocessor_config.json: not valid JSON, line"),
    "mean": (lambda f: edit(f / "preprocessor_config.json", image_mean=[0.5]), "cannot be loaded: mean must have 3 elements"),
    "scale": (lambda f: edit(f / "preprocessor_config.json", image_std=["nan"] * 3), "pixels that are not finite numbers"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "no chat template"),
    "foreign template": (lambda f: (f / "chat_template.jinja").write_text("{{ messages }}"), "renders 0 image blocks for 1 image"),
    "broken template": (lambda f: (f / "chat_template.jinja").write_text("{% for m"), "cannot be loaded: "),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json holds no names with values"),
    "hidden size": (lambda f: edit(f / "config.json", text_config__hidden_size="big"), "hidden_size"),
    "another family": (lambda f: edit(f / "config.json", model_type="llava"), "'llava' is not supported; supported: qwen2_5_vl"),
    "of another family": (lambda f: edit(f / "config.json", model_type="qwen3_vl"), "weights are missing, first model"),
    "patches": (lambda f: edit(f / "preprocessor_config.json", patch_size=16), "patch_size 16, config.json patch_size 14"),
    "vocabulary": (lambda f: fewer_rows(f, weights=False), r"is \[\d+, 32\] in the file, \[\d+, 32\] by"),
    "tokenizer": (fewer_rows, r"the tokenizer has \d+ tokens, the model's vocabulary \d+ rows"),
    "image token": (lambda f: edit(f / "config.json", image_token_id=3), "image_token_id 3, the tokenizer has <.image_pad.> at"),
    "fewer layers": (
        lambda f: edit(f / "config.json", text_config__num_hidden_layers=1, text_config__layer_types=["full_attention"]),
        "of layers that config.json does not have, first .*layers.1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_one_line_says_what_is_wrong(family, tmp_path, what, capfd):
    spoil, words = WRONG[what]
    folder = shutil.copytree(family["small"], tmp_path / "member")
    spoil(folder)
    with pytest.raises(LaidError, match=words) as caught:
        both(folder)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400 + len(str(folder))
    assert text.startswith(str(folder)), text
    assert capfd.readouterr() == ("", "")  # no table of the library's


def test_weight_files_of_several(sharded, tmp_path):
    assert both(sharded).model is not None
    files = sorted(f.name for f in sharded.glob("model-*.safetensors"))
    index = "model.safetensors.index.json"
    for number, (spoil, words) in enumerate(
        (
            (lambda f: [(f / name).unlink() for name in files[1:3]], f"2 of {len(files)} weight files are missing, first {files[1]}"),
            (lambda f: cut(f / files[2]), f"{files[2]}: not a whole safetensors file"),
            (lambda f: cut(f / index), f"{index}: not valid JSON"),
            (lambda f: (f / index).write_text("{}"), f"{index}: holds no weight_map"),
        )
    ):  # fmt: skip
        folder = shutil.copytree(sharded, tmp_path / str(number))
        spoil(folder)
        with pytest.raises(LaidError, match=words) as caught:
            load_model(folder)
        assert str(caught.value).startswith(str(folder)) and "\n" not in str(caught.value)


def commands(model, family, micro_file, coco_root, haystacks, out):
    """Each verb that takes a checkpoint, with a whole one wherever it takes a second."""
    config, data = (
        ["--config", str(micro_file)],
        ["--coco", str(coco_root), "--device", "cpu", "--out", str(out)],
    )
    train, good = str(haystacks / "train.json"), str(family["teacher"])
    student = [*config, *data, "--student-name", "small"]
    pair = ["distill", *config, *data, "--data", train]
    return [
        ["evaluate", *student, "--method", "base", "--model", model, "--questions", str(haystacks / "test"), "--sizes", "1"],
        ["train", *student, "--method", "sft", "--student", model, "--questions", train],
        ["teacher-cache", *config, *data, "--teacher", model, "--questions", train],
        [*pair, "--teacher", model, "--student", good],
        [*pair, "--teacher", good, "--student", model],
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["cut weights", "no tokenizer", "patches", "hub"])
def test_every_verb_says_it_in_one_line_before_any_work(
    what, family, micro_file, coco_root, haystacks, tmp_path, capfd, monkeypatch
):
    if what == "hub":
        from huggingface_hub import constants
        from huggingface_hub.utils import _http

        def nothing(*_args, **_kwargs):
            raise socket.gaierror(-2, "Name or service not known")

        monkeypatch.setattr(socket, "getaddrinfo", nothing)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(_http.time, "sleep", lambda _seconds: None)
        model, words = "owner/name", "owner/name: cannot be loaded: the hub cannot be reached"
    else:
        spoil, words = WRONG[what]
        folder = shutil.copytree(family["small"], tmp_path / "member")
        spoil(folder)
        model, words = str(folder), words.partition(r" \(")[0]
    for command in commands(model, family, micro_file, coco_root, haystacks, tmp_path / "out"):
        assert cli.main(command) == 2
        out, err = capfd.readouterr()
        assert err.count("\n") == 1 and words in err and err.startswith(f"laid {command[0]}: error: "), err
        assert out == "" and not (tmp_path / "out").exists()
    assert logging.getLogger("transformers").level != logging.CRITICAL
