"""Tokenizer and image processor of a Qwen vision-language model, composed without torchvision.

`Qwen2_5_VLProcessor` needs torchvision through its video processor; questions about images need only its
other two parts. Both are loaded from the files a checkpoint carries, by hub id or from a local folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from laid.data.images import open_image
from laid.errors import LaidError
from laid.io import read_json
from laid.models.loading import require_family, resolve, source_errors
from laid.models.prompts import PromptEncoder

# Everything but weights and their configuration that published Qwen vision-language checkpoints consist of.
FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json",
    "special_tokens_map.json", "chat_template.json", "chat_template.jinja", "preprocessor_config.json",
    "video_preprocessor_config.json", "processor_config.json",
)  # fmt: skip


class Processor:
    """What turns questions and image files into a model's inputs.

    tokenizer: with a chat template. image_processor: Qwen2VLImageProcessorPil. encoder: builds prompts. source: the
    checkpoint that both come from as they are, if any.
    """

    def __init__(self, tokenizer, image_processor: Qwen2VLImageProcessorPil, source: str | None = None):
        self.source = source
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.encoder = PromptEncoder(tokenizer, merge_size=image_processor.merge_size)

    @classmethod
    def load(
        cls, source: str | Path, min_pixels: int | None = None, max_pixels: int | None = None
    ) -> Processor:
        """From a hub id or a local folder. min_pixels, max_pixels: override what the checkpoint says."""
        source = resolve(source)
        require_family(source)
        for names in (
            ("tokenizer.json", "vocab.json"),
            ("preprocessor_config.json", "processor_config.json"),
        ):
            if Path(source).is_dir() and not any((Path(source) / name).is_file() for name in names):
                raise LaidError(
                    f"{source}: no {names[0]} in this folder: put the checkpoint's own tokenizer and preprocessor files there"
                )
        with source_errors(source):
            tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
            images = Qwen2VLImageProcessorPil.from_pretrained(source)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _chat_template(source)
        said = dict(images.size)
        images.size = {
            "shortest_edge": min_pixels or said.get("shortest_edge") or said.get("min_pixels"),
            "longest_edge": max_pixels or said.get("longest_edge") or said.get("max_pixels"),
        }
        if None in images.size.values():
            raise LaidError(
                f"{source}: its image processor says size {said}: expected shortest_edge and longest_edge"
            )
        as_they_are = min_pixels is None and max_pixels is None
        try:
            processor = cls(tokenizer, images, source if as_they_are else None)
            with source_errors(source):
                processor.encoder.ends("")  # an unusable template is found here, not at the first question
                # So are numbers that no pixel can be scaled by.
                tried = images(images=[Image.new("RGB", (56, 56))], return_tensors="pt")["pixel_values"]
                if not tried.isfinite().all():
                    raise LaidError("its image processor makes pixels that are not finite numbers")
        except LaidError as error:
            raise LaidError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from None
        return processor

    def save(self, folder: str | Path) -> None:
        """Write tokenizer and preprocessor files as `load` and transformers read them.

        Those of a checkpoint are copied byte for byte, so that any program that loads the checkpoint, of whatever
        version, loads the folder as well; only what was made here, or changed, is written again.
        """
        if self.source is None:
            self.tokenizer.save_pretrained(str(folder))
            self.image_processor.save_pretrained(str(folder))
            return
        from transformers.utils import cached_file

        for name in FILES:
            with source_errors(self.source):
                file = cached_file(self.source, name, _raise_exceptions_for_missing_entries=False)
            if file is not None:
                shutil.copyfile(file, Path(folder) / name)

    def require_fits(self, model_config) -> None:
        """Raise LaidError where these files are not those of a model with this config: patches, tokens.

        What the weights read as pixels and ids must be what these files make.
        """
        vision, images = model_config.vision_config, self.image_processor
        where = getattr(model_config, "_name_or_path", "") or "the model"
        for ours, theirs in (
            ("patch_size", "patch_size"), ("temporal_patch_size", "temporal_patch_size"), ("merge_size", "spatial_merge_size"),
        ):  # fmt: skip
            a, b = getattr(images, ours), getattr(vision, theirs)
            if a != b:
                raise LaidError(
                    f"{where}: preprocessor_config.json has {ours} {a}, config.json {theirs} {b}: they belong to different models"
                )
        tokens, rows = len(self.tokenizer), model_config.get_text_config().vocab_size
        if tokens > rows:
            raise LaidError(
                f"{where}: the tokenizer has {tokens} tokens, the model's vocabulary {rows} rows: they belong to different models"
            )
        if model_config.image_token_id != self.encoder.pad_id:
            raise LaidError(
                f"{where}: config.json says image_token_id {model_config.image_token_id}, the tokenizer has {self.encoder.image_pad}"
                f" at {self.encoder.pad_id}: they belong to different models"
            )

    def grid(self, width: int, height: int, file: str | Path = "an image") -> tuple[int, int]:
        """Merged grid (height, width) in visual tokens of an image of that many pixels, without decoding it.

        Raises LaidError, naming `file`, for proportions that the image processor refuses (200 to 1).
        """
        ip = self.image_processor
        factor = ip.patch_size * ip.merge_size
        try:
            resized = smart_resize(height, width, factor, ip.size["shortest_edge"], ip.size["longest_edge"])
        except ValueError as error:
            raise LaidError(f"{file}: {width} x {height} pixels cannot be used: {error}") from None
        return resized[0] // factor, resized[1] // factor

    def pixels(self, files: Sequence[str | Path]) -> tuple[torch.Tensor, torch.Tensor]:
        """(patches, grid_thw) of image files: (all patches, 3 * 2 * 14 * 14) float32, (images, 3) int64."""
        images = [open_image(file) for file in files]
        for file, image in zip(files, images):
            self.grid(*image.size, file)
        batch = self.image_processor(images=images, return_tensors="pt")
        return batch["pixel_values"], batch["image_grid_thw"]


def _chat_template(source: str) -> str:
    """The template of older checkpoints, which keep it in chat_template.json."""
    from transformers.utils import cached_file

    with source_errors(source):
        file = cached_file(source, "chat_template.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise LaidError(
            f"{source}: no chat template in tokenizer_config.json, chat_template.jinja or chat_template.json"
        )
    template = read_json(file)
    if not isinstance(template, dict) or not isinstance(template.get("chat_template"), str):
        raise LaidError(f"{file}: holds no text under chat_template; get it again")
    return template["chat_template"]
