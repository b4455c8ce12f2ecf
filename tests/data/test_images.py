"""What models see of an image file, against what a viewer shows."""

from __future__ import annotations

import base64
import io
import os
import re

import numpy as np
import pytest
from PIL import Image

from laid.data.coco import CocoImage, image_problem
from laid.data.images import data_url, image_size, open_image, require_images
from laid.errors import LaidError


def as_sent(file) -> tuple[bytes, np.ndarray]:
    """The bytes of an image's data: URL, and what a program shows that knows neither EXIF nor transparency."""
    content = base64.b64decode(data_url(file).split(",")[1])
    return content, np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """Half of the image is transparent, in every way that a PNG can say so; the other half keeps its grey."""
    file = tmp_path / "a.png"
    if mode in ("RGBA", "LA"):
        image = Image.new("RGBA", (8, 4), (90, 90, 90, 255))
        image.paste((0, 0, 0, 0), (0, 0, 4, 4))
        image.convert(mode).save(file)
    else:  # one colour stands for transparency
        image = Image.new("RGB", (8, 4), (90, 90, 90))
        image.paste((10, 10, 10), (0, 0, 4, 4))
        image = image.quantize(2) if mode == "P" else image.convert(mode)
        image.save(file, transparency=image.getpixel((0, 0)))
    seen = np.asarray(open_image(file))
    assert (seen[:, :4] == 255).all() and (abs(seen[:, 4:].astype(int) - 90) < 3).all()
    assert (as_sent(file)[1] == seen).all()


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (2, 2), (0, 0, 100, 128)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 177)


@pytest.mark.parametrize("turn", range(1, 9))
def test_an_image_is_turned_as_viewers_turn_it(tmp_path, turn):
    """A photograph of a known scene, stored as a camera held in each of the eight ways stores it."""
    scene = Image.effect_noise((24, 16), 80).convert("RGB")
    stored = {  # the inverse of what EXIF's orientation asks for
        1: [], 2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4],
    }[turn]  # fmt: skip
    kept = scene
    for method in stored:
        kept = kept.transpose(method)
    exif = Image.Exif()
    exif[0x0112] = turn
    kept.save(tmp_path / "a.png", exif=exif)
    assert image_size(tmp_path / "a.png") == (24, 16)
    assert np.array_equal(open_image(tmp_path / "a.png"), scene)
    content, sent = as_sent(tmp_path / "a.png")
    assert np.array_equal(sent, scene)
    assert (content == (tmp_path / "a.png").read_bytes()) == (turn == 1)
    assert image_problem(tmp_path / "a.png", CocoImage(1, "a.png", 24, 16)) is None
    said = image_problem(tmp_path / "a.png", CocoImage(1, "a.png", 16, 24))
    assert ("EXIF turns it by a quarter" if turn >= 5 else "replace it") in said


def test_what_models_cannot_use_is_one_line(tmp_path):
    Image.fromarray(np.full((4, 4), 40000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("F", (4, 4)).save(tmp_path / "float.tiff")
    Image.new("RGB", (4, 4)).save(tmp_path / "whole.png", exif=b"Exif\0\0broken")
    Image.new("RGB", (900, 4)).save(tmp_path / "thin.png")
    (tmp_path / "script.jpg").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\nshowpage\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "loop.png").symlink_to("loop.png")
    assert open_image(tmp_path / "whole.png").size == (4, 4)
    for name, says in {
        "deep.png": r"has 16 or more bits a channel \(mode I;16\)",
        "float.tiff": "has 16 or more bits",
        "script.jpg": "not a whole image",
        "pipe.png": "no such image",
        "loop.png": "no such image",
    }.items():
        with pytest.raises(LaidError, match=f"{re.escape(str(tmp_path / name))}: {says}"):
            open_image(tmp_path / name)
    assert "thinner than the 200 to 1" in image_problem(tmp_path / "thin.png", CocoImage(1, "", 900, 4))


def test_missing_images_say_where_they_are(tmp_path):
    (tmp_path / "coco/val2017").mkdir(parents=True)
    (tmp_path / "coco/val2017/1.png").touch()
    require_images(tmp_path / "coco", ["val2017/1.png"], ["q.json"])
    for given in ("coco/val2017", "."):
        with pytest.raises(LaidError, match=f"they lie below {tmp_path}/coco: give that folder"):
            require_images(tmp_path / given, ["val2017/1.png"], ["q.json"])
    with pytest.raises(
        LaidError, match=r"1 of the 2 images that q.json names .* first val2017/2.png; of COCO"
    ):
        require_images(tmp_path / "coco", ["val2017/1.png", "val2017/2.png"], ["q.json"])
