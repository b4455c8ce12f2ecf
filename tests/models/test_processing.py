import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from laid.data.images import image_size, open_image
from laid.errors import LaidError
from laid.io import read_json, write_json
from laid.models.processing import Processor


@pytest.fixture(scope="module")
def processor(family):
    return Processor.load(family["small"], min_pixels=4 * 784, max_pixels=16 * 784)


def save(path, width, height, mode="RGB", seed=0):
    pixels = np.random.default_rng([seed, 1]).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    Image.fromarray(pixels.squeeze(), mode=mode).save(path)
    return path


@settings(max_examples=20, deadline=None)
@given(width=st.integers(8, 300), height=st.integers(8, 300))
def test_the_grid_is_the_one_the_image_processor_makes(processor, tmp_path_factory, width, height):
    file = save(tmp_path_factory.mktemp("image") / "a.png", width, height)
    patches, grids = processor.pixels([file])
    assert image_size(file) == (width, height)
    merged = (int(grids[0, 1]) // 2, int(grids[0, 2]) // 2)
    assert processor.grid(width, height) == merged
    assert grids[0, 0] == 1 and patches.shape == (4 * merged[0] * merged[1], 3 * 2 * 14 * 14)


def test_saved_and_loaded_alike(processor, family, tmp_path):
    processor.save(tmp_path / "p")
    shutil.copy(family["small"] / "config.json", tmp_path / "p")
    again = Processor.load(tmp_path / "p")
    file = save(tmp_path / "a.png", 90, 60)
    for a, b in zip(processor.pixels([file]), again.pixels([file])):
        assert a.equal(b)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.encoder.ends("x")[1].tolist() == processor.encoder.ends("x")[1].tolist()


def test_grey_and_transparent_images_become_rgb(tmp_path):
    assert open_image(save(tmp_path / "g.png", 9, 5, "L")).mode == "RGB"
    assert open_image(save(tmp_path / "a.png", 9, 5, "RGBA")).size == (9, 5)


def test_images_that_cannot_be_used(processor, tmp_path):
    whole = save(tmp_path / "whole.png", 60, 60).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    save(tmp_path / "thin.png", 900, 4)
    for name, wrong in {
        "absent": "no such image",
        "cut": "not a whole image",
        "text": "not a whole image",
        "empty": "not a whole image",
        "thin": "900 x 4 pixels cannot be used",
    }.items():
        with pytest.raises(LaidError, match=wrong) as caught:
            processor.pixels([tmp_path / f"{name}.png"])
        assert f"{name}.png" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(LaidError, match="no such image"):
        image_size(tmp_path / "absent.png")
    with pytest.raises(LaidError, match="not a whole image"):
        image_size(tmp_path / "text.png")


def test_folders_without_tokenizer_preprocessor_or_template(family, tmp_path):
    for number, gone in enumerate(("tokenizer", "preprocessor_config", "chat_template", "config")):
        folder = shutil.copytree(family["small"], tmp_path / str(number))
        for file in folder.glob(f"{gone}*"):
            file.unlink()
        with pytest.raises(LaidError, match=str(folder)) as caught:
            Processor.load(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["transformers 5", "min_pixels"])
def test_other_places_of_the_image_processor_are_read(family, tmp_path, kind):
    """transformers 5 writes it into processor_config.json alone; older tools name the size's ends min and max."""
    folder = tmp_path / "other"
    shutil.copytree(family["small"], folder)
    said = read_json(folder / "preprocessor_config.json")
    said["size"] = {"shortest_edge": 784, "longest_edge": 1568}
    if kind == "min_pixels":
        said["size"] = {"min_pixels": 784, "max_pixels": 1568}
        write_json(folder / "preprocessor_config.json", said)
    else:
        (folder / "preprocessor_config.json").unlink()
        write_json(folder / "processor_config.json", {"image_processor": said})
    assert Processor.load(folder).grid(280, 280) == (1, 1)
    assert Processor.load(folder, max_pixels=16 * 784).grid(280, 280) == (4, 4)


def test_an_older_chat_template_file_is_read(family, tmp_path):
    from laid.io import write_json

    folder = shutil.copytree(family["small"], tmp_path / "old")
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    write_json(folder / "chat_template.json", {"chat_template": template})
    assert Processor.load(folder).tokenizer.chat_template == template
    write_json(folder / "chat_template.json", {"other": template})
    with pytest.raises(LaidError, match="holds no text under chat_template"):
        Processor.load(folder)


def test_published_files(shared):
    """Grids against the published preprocessor's own on real photographs; the other two folders hold a config alone."""
    folder = shared / "qwen2_5_vl"
    processor = Processor.load(folder / "Qwen2.5-VL-7B-Instruct")
    files = sorted((shared / "coco_slice/val2017").iterdir())[:12]
    _, grids = processor.pixels(files)
    assert [(2 * h, 2 * w) for h, w in (processor.grid(*image_size(f)) for f in files)] == [
        tuple(g) for g in grids[:, 1:].tolist()
    ]
    for size in ("3B", "32B"):
        with pytest.raises(LaidError, match=f"{size}-Instruct: ") as caught:
            Processor.load(folder / f"Qwen2.5-VL-{size}-Instruct")
        assert "\n" not in str(caught.value)


def test_published_preprocessing_by_hand(family):
    """What Qwen2.5-VL's published limits (3,136 and 12,845,056 pixels) make of common photographs."""
    processor = Processor.load(family["small"], min_pixels=3136, max_pixels=12845056)
    hand = {
        (640, 480): (17, 23),
        (480, 640): (23, 17),
        (640, 427): (15, 23),
        (500, 375): (13, 18),
        (28, 28): (2, 2),
    }
    assert {size: processor.grid(*size) for size in hand} == hand


def test_an_exported_folder_is_what_a_loader_of_the_checkpoint_needs(shared, micro, tmp_path):
    """Published files are copied byte for byte beside a model of the published vocabulary; transformers' own loaders
    read the folder back, generation settings and all, as lmms-eval's do (docs/guides/benchmarks.md)."""
    from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration

    published = shared / "qwen2_5_vl/Qwen2.5-VL-7B-Instruct"
    config = AutoConfig.from_pretrained(published)
    config.text_config.update(
        {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        | {"num_key_value_heads": 1, "head_dim": 8, "layer_types": ["full_attention"], "vocab_size": 152064}
    )
    config.text_config.rope_parameters["mrope_section"] = [2, 1, 1]
    config.vision_config.update({"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 16})  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig.from_pretrained(published)
    model.save_pretrained(tmp_path / "model")
    processor = Processor.load(published)
    processor.save(tmp_path / "model")

    names = {path.name for path in (tmp_path / "model").iterdir()}
    copied = {"tokenizer.json", "tokenizer_config.json", "chat_template.json", "preprocessor_config.json"}
    assert names == copied | {"config.json", "generation_config.json", "model.safetensors"}
    for name in copied:
        assert (tmp_path / "model" / name).read_bytes() == (published / name).read_bytes()
    again = Processor.load(tmp_path / "model")
    assert again.tokenizer.chat_template == processor.tokenizer.chat_template
    assert again.grid(640, 480) == processor.grid(640, 480) == (17, 23)
    found = GenerationConfig.from_pretrained(tmp_path / "model")
    assert found.eos_token_id == [151645, 151643] and found.repetition_penalty == 1.05
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config.image_token_id == again.encoder.pad_id == 151655


def test_a_changed_processor_is_written_not_copied(family, tmp_path):
    saved = "preprocessor_config.json"
    Processor.load(family["small"], max_pixels=1568).save(tmp_path)
    assert read_json(tmp_path / saved)["size"]["longest_edge"] == 1568
    Processor.load(family["small"]).save(tmp_path)
    assert (tmp_path / saved).read_bytes() == (family["small"] / saved).read_bytes()
