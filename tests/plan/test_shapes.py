"""Where shapes come from, and that those built in are those published."""

import json

import pytest

from laid.errors import LaidError
from laid.models.loading import parameters
from laid.plan.shapes import PUBLISHED, member_config, meta_model, published_config, text_tokens
from laid.settings import validate

# Half the bytes that the published weight indices state (3B, 7B); models built from the published configs (all three).
WEIGHTS = {"3B": 3_754_622_976, "7B": 8_292_166_656, "32B": 33_452_718_336}


def size_of(name):
    return name.split("-")[2]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_shapes_have_the_published_number_of_weights(name):
    assert parameters(meta_model(published_config(name))) == WEIGHTS[size_of(name)]


@pytest.mark.parametrize("name", PUBLISHED)
def test_built_in_shapes_are_those_of_the_published_files(name, shared):
    built = meta_model(published_config(name))
    settings = validate({"models": {"checkpoints": {"teacher": name}}})
    found, source = member_config(settings, "teacher", shared / "qwen2_5_vl")
    assert source.endswith(name.partition("/")[2])
    theirs = meta_model(found)
    shapes = {key: tuple(p.shape) for key, p in built.named_parameters()}
    assert shapes == {key: tuple(p.shape) for key, p in theirs.named_parameters()}


def test_a_folder_with_only_a_config_is_enough(tmp_path, offline):
    folder = tmp_path / "qwen"
    folder.mkdir()
    published_config("Qwen/Qwen2.5-VL-3B-Instruct").save_pretrained(folder)
    settings = validate({"models": {"checkpoints": {"small": str(folder)}}})
    found, source = member_config(settings, "small")
    assert (source, found.get_text_config().hidden_size) == (str(folder), 2048)
    renamed = tmp_path / "configs" / "medium"
    renamed.mkdir(parents=True)
    (folder / "config.json").rename(renamed / "config.json")
    settings = validate({"models": {"checkpoints": {"medium": "someone/else"}}})
    assert member_config(settings, "medium", tmp_path / "configs")[1] == str(renamed)


def test_known_checkpoints_need_no_network_and_others_say_what_to_do(offline):
    settings = validate(
        {"models": {"checkpoints": {"small": "Qwen/Qwen2.5-VL-7B-Instruct", "medium": "nobody/nothing"}}}
    )
    found, source = member_config(settings, "small")
    assert found.get_text_config().hidden_size == 3584 and source.endswith("(built-in shapes)")
    with pytest.raises(LaidError, match="nobody/nothing: cannot be loaded.*--configs DIR") as caught:
        member_config(settings, "medium")
    assert "\n" not in str(caught.value)


def test_a_broken_config_is_one_line(tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": ')
    settings = validate({"models": {"checkpoints": {"small": str(folder)}}})
    with pytest.raises(LaidError, match=r"broken/config.json: not valid JSON") as caught:
        member_config(settings, "small")
    assert "\n" not in str(caught.value)
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))
    with pytest.raises(LaidError, match="broken: cannot be loaded"):
        member_config(settings, "small")


def test_the_small_family_has_its_own_shapes_and_prompts(micro, family, haystacks):
    from laid.models.loading import load_model

    for name in ("teacher", "small"):
        found, source = member_config(micro, name)
        real = load_model(family[name])
        assert source == "family" and parameters(meta_model(found)) == parameters(real)
    assert text_tokens(micro) > 0
    with pytest.raises(LaidError, match="'medium' has neither"):
        member_config(micro, "medium")
