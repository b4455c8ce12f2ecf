import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from laid.errors import LaidError
from laid.models.loading import load_model, parameter_label, parameters, resolve, spread


@pytest.fixture
def folder(family, tmp_path):
    return shutil.copytree(family["small"], tmp_path / "member")


def one_line(folder, match=None):
    with pytest.raises(LaidError, match=match) as caught:
        load_model(folder)
    text = str(caught.value)
    assert text.startswith(str(folder)) and "\n" not in text and len(text) < 700, text


def test_transformers_loads_a_member(family):
    ours = load_model(family["small"])
    theirs = AutoModelForImageTextToText.from_pretrained(family["small"])
    assert isinstance(theirs, Qwen2_5_VLForConditionalGeneration) and not ours.training
    weights = load_file(family["small"] / "model.safetensors")
    assert len(weights) == len(list(ours.parameters()))
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32, name
    assert sum(w.numel() for w in weights.values()) == parameters(ours)


def test_a_file_is_missing(folder):
    (folder / "model.safetensors").unlink()
    one_line(folder)


def test_a_file_is_cut_short(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    one_line(folder, "not a whole safetensors file")


def test_no_pickle_is_read(folder, monkeypatch):
    """A folder whose weights are pickled is refused, good weights as they are, without unpickling anything."""
    file = folder / "model.safetensors"
    torch.save(load_file(file), folder / "pytorch_model.bin")
    file.unlink()
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("a pickle was opened"))
    one_line(folder, "safetensors")


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.language_model.layers.1.self_attn.q_proj.bias"])
def test_a_weight_is_missing(folder, lost):
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith(lost.removeprefix("model.language_model.")))
    save_file({n: w for n, w in weights.items() if n != name}, file, metadata={"format": "pt"})
    one_line(folder, "1 weights are missing, first .*" + lost.rpartition(".")[2])


def test_a_weight_has_another_shape(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = weights["lm_head.weight"][:-1].contiguous()
    save_file(weights, file, metadata={"format": "pt"})
    one_line(folder)


def test_tied_embeddings_need_no_head_in_the_file(family, tmp_path):
    """As in the published 3B: the head is the embedding, and the file does not repeat it."""
    config = AutoConfig.from_pretrained(family["small"])
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied/model.safetensors")
    loaded = load_model(tmp_path / "tied")
    assert loaded.lm_head.weight is loaded.model.language_model.embed_tokens.weight
    assert parameters(loaded) == sum(
        w.numel() for w in load_file(tmp_path / "tied/model.safetensors").values()
    )


def test_broken_or_foreign_configs(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config)[:50])
    one_line(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    one_line(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "no-such-thing"}))
    one_line(folder)
    (folder / "config.json").unlink()
    one_line(folder, "no config.json in this folder")


def test_what_is_no_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").touch()
    with pytest.raises(LaidError, match="is a file, expected a checkpoint folder"):
        resolve(tmp_path / "file")
    for absent in (tmp_path / "absent", "results/small/models/typo", "./typo", "typo"):
        with pytest.raises(LaidError, match="no such checkpoint folder"):
            resolve(absent)
    assert resolve("owner/name") == "owner/name"


def test_labels():
    counts = {
        138_000: "138K",
        1_640: "1.6K",
        352_000: "352K",
        7_600_000_000: "7.6B",
        33_452_718_336: "33B",
        12: "12",
    }
    assert {n: parameter_label(n) for n in counts} == counts


PUBLISHED = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_configs(shared, size):
    """Parameter counts of shared/README.md; 32B's config is written in an older, shorter style."""
    config = AutoConfig.from_pretrained(shared / f"qwen2_5_vl/Qwen2.5-VL-{size}-Instruct")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert parameters(model) == PUBLISHED[size]


def test_a_model_too_large_for_one_gpu_is_laid_over_all(family, monkeypatch):
    size = 4 * parameters(load_model(family["small"]))

    def found(gpus, memory, device="cuda"):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory)
        )
        return spread(str(family["small"]), torch.float32, device)

    assert found(2, 1.9 * size) == "auto" and found(2, 2.1 * size) is None
    assert (
        found(1, size / 2) is None
        and found(2, size / 2, "cpu") is None
        and found(2, size / 2, "cuda:1") is None
    )


def test_what_device_map_hooks_in_changes_no_logits(family):
    """The hooks that move tensors between GPUs, here between the CPU and the CPU."""
    from accelerate import dispatch_model

    from laid.models.forward import collate, last_logits
    from laid.models.prompts import EncodedPrompt, mrope_positions
    from laid.training.teacher import teacher_outputs

    ids = torch.arange(5, 25).numpy()
    prompt = EncodedPrompt(ids, mrope_positions(20, [], 0), ids[:0], ids < 0)
    batch, model = collate([prompt], []), load_model(family["small"])
    with torch.no_grad():
        plain = last_logits(model, batch), last_logits(model, batch, 7), teacher_outputs(model, batch, (1,))
        places = {"model.visual": "cpu", "model.language_model.embed_tokens": "cpu", "lm_head": "cpu"}
        places |= {
            f"model.language_model.{part}": "cpu" for part in ("layers.0", "layers.1", "norm", "rotary_emb")
        }
        dispatch_model(model, places, main_device="cpu", force_hooks=True)
        hooked = last_logits(model, batch), last_logits(model, batch, 7), teacher_outputs(model, batch, (1,))
    assert torch.equal(plain[0], hooked[0]) and torch.equal(plain[1], hooked[1])
    assert torch.equal(plain[2][0], hooked[2][0]) and torch.equal(plain[2][1][1].q, hooked[2][1][1].q)
