"""`laid push` against a server that speaks the hub's protocol: what is shown, what is sent, what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForImageTextToText

from laid.cli import main
from laid.methods.registry import load_with_method


@pytest.fixture(scope="module")
def made(family, haystacks, coco_root, micro_file, tmp_path_factory):
    """The result of a distillation that leaves an adapter."""
    out = tmp_path_factory.mktemp("pushed") / "mine"
    words = [
        "distill", "--config", str(micro_file), "--teacher", str(family["teacher"]), "--student", str(family["small"]),
        "--data", str(haystacks / "train.json"), "--coco", str(coco_root), "--device", "cpu", "--method", "sft",
    ]  # fmt: skip
    assert main([*words, "--out", str(out)]) == 0
    return out


def test_nothing_is_sent_until_asked_and_then_what_was_shown(made, hub, capsys):
    assert main(["push", str(made), "me/mine"]) == 0
    shown = capsys.readouterr().out
    assert not hub.requests and "nothing was sent: --yes sends" in shown
    assert (
        'PeftModel.from_pretrained(base, "me/mine")' in shown and "--merge sends a whole checkpoint" in shown
    )
    assert main(["push", str(made), "me/mine", "--yes"]) == 0
    said = capsys.readouterr().out
    assert {token for _, token, _ in hub.requests} == {"Bearer hf_secret"} and "hf_secret" not in said
    (created,) = [json.loads(body) for path, _, body in hub.requests if path == "/api/repos/create"]
    assert (created["name"], created["organization"], created["visibility"]) == ("mine", "me", "private")
    listed = dict(reversed(line.split()) for line in shown.splitlines() if line.endswith(tuple(hub.files)))
    assert {name: int(size.replace(",", "")) for name, size in listed.items()} == {
        name: len(content) for name, content in hub.files.items()
    }
    assert set(hub.files) == {
        "README.md", "adapter_config.json", "adapter_model.safetensors",
        *(f"laid/{name}" for name in ("distill.json", "run.json", "learned.json", "log.jsonl")),
    }  # fmt: skip
    assert hub.files["adapter_model.safetensors"] == (made / "model/adapter_model.safetensors").read_bytes()


def test_a_merged_adapter_is_a_checkpoint_that_transformers_loads(made, hub, micro, family, tmp_path, capsys):
    assert main(["push", str(made), "me/mine", "--yes", "--merge", str(family["small"])]) == 0
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    card = (tmp_path / "README.md").read_text()
    assert 'AutoModelForImageTextToText.from_pretrained("me/mine")' in card and "PeftModel" not in card
    assert "## Training" in card and (tmp_path / "preprocessor_config.json").is_file()
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path)
    wanted = load_with_method(micro, "sft", family["small"], made).model
    for (name, ours), (_, theirs) in zip(merged.named_parameters(), wanted.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert not torch.equal(merged.lm_head.weight, 0 * merged.lm_head.weight)


def test_what_cannot_be_sent_is_one_line(made, hub, family, tmp_path, capsys, monkeypatch):
    def refused(match, *words):
        assert main(["push", *map(str, words)]) == 2
        error = capsys.readouterr().err.strip()
        assert match in error and "\n" not in error

    refused("expected OWNER/NAME", made, "mine")
    refused("not a result of `laid distill`", family["small"], "me/mine")
    refused("not the student that", made, "me/mine", "--merge", family["teacher"])
    other = shutil.copytree(made, tmp_path / "other")
    record = json.loads((other / "distill.json").read_text())
    for broken, says in (
        ({}, "distill.json: name: Field required"),
        (record | {"hashes": {"student": "0"}}, "distill.json: hashes.exported: Field required"),
        (record | {"settings": {"training": {"dtype": "load"}}}, "distill.json: settings.training.dtype: "),
    ):
        (other / "distill.json").write_text(json.dumps(broken))
        refused(says, other, "me/mine")
    (other / "distill.json").write_text(json.dumps(record))
    (other / "model/README.md").write_bytes(b"\xff")
    refused("README.md: not UTF-8", other, "me/mine")
    (other / "model/pytorch_model.bin").touch()
    refused("changed since", other, "me/mine")
    hub.status = 401
    refused("me/mine: not sent: ", made, "me/mine", "--yes")
    hub.status = 200
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("no token for the hub: set HF_TOKEN", made, "me/mine", "--yes")
