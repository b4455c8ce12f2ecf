"""Checkpoints, adapters, teacher's caches, training states and cells, broken: refused in one line, or read as they were."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from harness import broken_bytes, broken_json, examples, judge, refused
from hypothesis import given
from safetensors.torch import load, load_file

from laid.evaluation.cells import read_cell, write_cell
from laid.methods.registry import load_with_method
from laid.training.checkpoint import Checkpoint, State
from laid.training.teacher_cache import TeacherCache
from synthetic import cell as synthetic_cell


@pytest.mark.parametrize(
    "name", ["config.json", "preprocessor_config.json", "tokenizer_config.json", "generation_config.json"]
)
def test_checkpoint_files(name, family, micro_file, coco_root, haystacks, tmp_path):
    model, out = shutil.copytree(family["small"], tmp_path / "model"), tmp_path / "made"
    words = [
        "evaluate",
        "--config",
        micro_file,
        "--student-name",
        "small",
        "--method",
        "base",
        "--model",
        model,
    ]
    words += ["--coco", coco_root, "--questions", haystacks / "test", "--sizes", 1, "--out", out]

    def sound(_: str) -> None:
        read = json.loads((out / "1.json").read_text())
        assert read["n"] == len(read["answers"]) == 10

    @examples(0.15)
    @given(broken_json(json.loads((model / name).read_text())))
    def broken(data: bytes) -> None:
        (model / name).write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        judge(
            f"checkpoints: {name}", [*words, "--device", "cpu"], [model, "small base: an answer"], out, sound
        )

    broken()


def test_weights(family, micro_file, coco_root, haystacks, tmp_path):
    model, out = shutil.copytree(family["small"], tmp_path / "model"), tmp_path / "made"
    file = model / "model.safetensors"
    words = [
        "evaluate",
        "--config",
        micro_file,
        "--student-name",
        "small",
        "--method",
        "base",
        "--model",
        model,
    ]
    words += ["--coco", coco_root, "--questions", haystacks / "test", "--sizes", 1, "--out", out]

    @examples(0.15)
    @given(broken_bytes(file.read_bytes()))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        shutil.rmtree(out, ignore_errors=True)
        judge("checkpoints: weights", [*words, "--device", "cpu"], [model, "small base: an answer"], out)

    broken()


def test_adapters(family, micro, runs, tmp_path):
    """Renamed, cut or other tensors; bits of a value are for the record of the run to tell."""
    run = shutil.copytree(runs("sft").out, tmp_path / "seed0")
    file, said = run / "model/adapter_model.safetensors", run / "model/adapter_config.json"
    whole, config = file.read_bytes(), said.read_bytes()
    names = set(load(whole))

    def read() -> None:
        load_with_method(micro, "sft", family["small"], run)
        assert set(load_file(file)) == names

    @examples(0.1)
    @given(broken_bytes(whole))
    def weights(data: bytes) -> None:
        file.write_bytes(data)
        refused("adapters: weights", read, [run])

    @examples(0.1)
    @given(broken_json(json.loads(config)))
    def configuration(data: bytes) -> None:
        said.write_bytes(data)
        refused("adapters: adapter_config.json", read, [run])

    weights()
    file.write_bytes(whole)
    configuration()


def test_teacher_caches(cache, haystacks, tmp_path):
    folder = shutil.copytree(cache, tmp_path / "cache")
    index, shard = folder / "index.json", folder / "shard-00000.safetensors"
    whole, sound = shard.read_bytes(), index.read_bytes()

    def read() -> None:
        opened = TeacherCache(folder, haystacks / "train.json")
        opened.verify()
        assert shard.read_bytes() == whole
        opened.logits([0, len(opened.lengths) - 1])
        opened.queries_keys(opened.layers[0], [0], max(opened.lengths))

    @examples()
    @given(broken_bytes(whole))
    def shards(data: bytes) -> None:
        shard.write_bytes(data)
        assert refused("teacher's caches: shards", read, [folder]) or data == whole

    @examples()
    @given(broken_json(json.loads(sound)))
    def indexes(data: bytes) -> None:
        index.write_bytes(data)
        refused("teacher's caches: index.json", read, [folder])

    shards()
    shard.write_bytes(whole)
    indexes()


def test_training_states(tmp_path):
    checkpoint = Checkpoint(tmp_path / "c", "key", 1)
    checkpoint.save(State(3, {"w": torch.ones(40), "o": torch.zeros(3)}, [{"loss": 0.5, "step": 3}]))
    tensors, about = tmp_path / "c/state.safetensors", tmp_path / "c/state.json"
    whole, sound = tensors.read_bytes(), about.read_bytes()

    def read() -> None:
        found = checkpoint.load()
        # Another key is another run's.
        assert found is None or (found.step, found.log) == (3, [{"loss": 0.5, "step": 3}])

    @examples()
    @given(broken_bytes(whole))
    def states(data: bytes) -> None:
        tensors.write_bytes(data)
        assert refused("training states: tensors", read, [tmp_path]) or data == whole

    @examples()
    @given(broken_json(json.loads(sound)))
    def records(data: bytes) -> None:
        about.write_bytes(data)
        refused("training states: state.json", read, [tmp_path])

    states()
    tensors.write_bytes(whole)
    records()


def test_cells(tmp_path):
    sound = synthetic_cell("7B", "sft", 5, [[1, 1, 0, 1]])
    file = tmp_path / "7B/sft/5.json"
    write_cell(file, sound)
    strange = sound["provenance"].keys()

    def read() -> None:
        found = read_cell(file)
        assert {k: found[k] for k in sound} == sound and strange <= found["provenance"].keys()

    @examples()
    @given(broken_json(sound))
    def broken(data: bytes) -> None:
        file.write_bytes(data)
        refused("cells", read, [file])

    broken()
