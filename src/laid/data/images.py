"""Image files as the models see them: turned as EXIF says, what is transparent on white, 8 bits a channel.

White is what the family's own tools lay below transparent pixels (qwen-vl-utils), turning is what viewers and
transformers' image loading do; Pillow alone shows transparency black and cuts off all but the lowest of 16 bits.
"""

from __future__ import annotations

import base64
import functools
import io
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from laid.errors import LaidError
from laid.io import safe_join

READING = "turned by EXIF, on white, 8 bits"  # part of the key of stored features
# Pillow hands other formats to programs (EPS to Ghostscript), which no image file may start.
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
THINNEST = 200  # the image processors of all families refuse proportions above 200 to 1
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE, 8: Image.Transpose.ROTATE_90,
}  # fmt: skip


def open_image(file: str | Path) -> Image.Image:
    """Decode an image file to RGB. Raises LaidError where it is missing, broken, or has more than 8 bits a channel."""
    with _opened(file) as image:
        turn = _TURNS.get(_orientation(image))
        image.load()
        image = image if turn is None else image.transpose(turn)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white


def data_url(file: str | Path) -> str:
    """An image as models see it, as a `data:` URL: a JPEG or PNG file byte for byte where nothing needs to be done to it, else a
    PNG. Raises LaidError where it is missing or broken."""
    kind = _as_it_is(str(file))
    if kind is not None:
        content = Path(file).read_bytes()
    else:
        kind, made = "PNG", io.BytesIO()
        open_image(file).save(made, kind)
        content = made.getvalue()
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"


@functools.cache
def _as_it_is(file: str) -> str | None:
    """The format of an image file that any program shows as laid does, else None."""
    with _opened(file) as image:
        image.load()
        plain = (
            image.mode in ("L", "RGB", "P") and not image.has_transparency_data and _orientation(image) == 1
        )
        return image.format if plain and image.format in ("JPEG", "PNG") else None


def image_size(file: str | Path) -> tuple[int, int]:
    """(width, height) in pixels as one sees them, from the file's header. Raises LaidError where it is missing or broken."""
    with _opened(file) as image:
        return image.size[:: -1 if _orientation(image) >= 5 else 1]


def require_images(root: str | Path, named: Sequence[str], files: Sequence[str | Path]) -> None:
    """Raise LaidError, before any work is done, where images that question files name are not below `root`."""
    missing = sorted(path for path in named if not safe_join(root, path).is_file())
    if not missing:
        return
    first, asking = missing[0], " ".join(map(str, files))
    here = Path(root).absolute()
    around = [
        here.parent,
        *(sorted(path for path in here.iterdir() if path.is_dir()) if here.is_dir() else []),
    ]
    if right := next((folder for folder in around if (folder / first).is_file()), None):
        advice = f"they lie below {right}: give that folder"
    else:
        advice = (
            "of COCO, just those are fetched with: laid data --config config.yaml configs/paper.yaml"
            f" --out {root} --questions {asking}"
        )
    raise LaidError(
        f"{root}: no such image: {len(missing)} of the {len(named)} images that {asking} names are missing, first {first};"
        f" {advice}"
    )


def lies_on_its_side(file: str | Path) -> bool:
    """Whether EXIF says that an image file is to be turned by a quarter. Raises LaidError where it is missing or broken."""
    with _opened(file) as image:
        return _orientation(image) >= 5


def _orientation(image: Image.Image) -> int:
    """How EXIF says that the image lies, 1 to 8; 1, upright, where it says nothing that can be read."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # what stands behind the pixels is not looked for: that would decode them
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except (
        OSError,
        SyntaxError,
        ValueError,
        LookupError,
        TypeError,
        struct.error,
    ):  # the pixels may be whole
        return 1
    return found if found in _TURNS else 1


@contextmanager
def _opened(file: str | Path) -> Iterator[Image.Image]:
    """An image file, its header read. Raises LaidError, also for what decoding raises inside."""
    if not Path(file).is_file():  # opening a pipe would wait for its writer
        raise LaidError(f"{file}: no such image")
    try:
        with Image.open(file, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise LaidError(
                    f"{file}: has 16 or more bits a channel (mode {image.mode}), of which models see 8: convert it"
                )
            yield image
    except Image.DecompressionBombError as error:
        raise LaidError(f"{file}: {str(error).partition(',')[0]}: shrink it") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, MemoryError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise LaidError(f"{file}: not a whole image ({reason}): replace it") from None
