"""Peak memory of a whole evaluation at 150 photographs, beside what `laid plan` says of it.

    python bench/evaluate_memory.py --coco COCO --processor DIR          3 minutes on a CPU core

COCO: a folder with annotations/ and at least 150 images in val2017/. DIR: tokenizer and preprocessor files of a published
Qwen2.5-VL. The model has the published vocabulary and make, four layers 128 wide, and random weights: what is measured is how
memory comes about (features of 150 images, reading in chunks, keys and values kept), not how large a real model is.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import torch

from laid.data.haystacks import build_haystacks
from laid.errors import LaidError
from laid.evaluation.evaluate import evaluate_cells
from laid.evaluation.sets import question_sets
from laid.plan.estimate import Estimator
from laid.plan.measure import peak_bytes
from laid.plan.shapes import meta_model, published_config
from laid.plan.tokens import DELIMITERS, TEXT
from laid.settings import load

TOP = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco", type=Path, required=True)
    parser.add_argument("--processor", type=Path, required=True)
    parser.add_argument("--images", type=int, default=150)
    parser.add_argument("--questions", type=int, default=2)
    parser.add_argument(
        "--chunk", type=int, default=4096, help="tokens read at a time; 0 reads prompts whole"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    for folder in (args.coco, args.processor):
        if not folder.is_dir():
            raise SystemExit(f"evaluate_memory: {folder}: no such folder")
    with tempfile.TemporaryDirectory() as folder:
        try:
            compare(args, Path(folder))
        except LaidError as error:
            raise SystemExit(f"evaluate_memory: {error}") from None


def compare(args: argparse.Namespace, folder: Path) -> None:
    checkpoint = model_of(args.processor, folder / "model")
    settings = load([TOP / "config.yaml"])
    settings = settings.changed(
        {
            "models": {"checkpoints": {name: str(checkpoint) for name in ("teacher", "small", "medium")}},
            "data": {"source": "local", "root": str(args.coco)},
            "evaluation": {"chunk_tokens": args.chunk, "batch_tokens": 1, "scoring": "logits"},
            "haystacks": {
                "train": {"questions": 20, "min_size": 2, "max_size": 5},
                "validation": {"share": 0.25, "questions": 4, "sizes": [5]},
                "test": {"questions": args.questions, "sizes": [args.images]},
            },
        }
    )
    build_haystacks(settings, args.coco, folder / "haystacks")

    def plan(spread: float | None, tokens: float | None = None):
        images = {"tokens": tokens, "spread": spread}
        return Estimator(settings.changed({"plan": {"images": images}})).evaluate(
            "small", "base", [args.images]
        )

    cells: list[dict] = []

    def evaluate() -> None:
        cells.extend(
            evaluate_cells(
                settings, "small", "base", checkpoint, [], args.coco,
                question_sets([folder / "haystacks/test"], [args.images], args.coco), folder / "cells/small/base",
            )
        )  # fmt: skip

    measured = peak_bytes(evaluate)
    tokens = cells[0]["tokens_mean"]
    longest = plan(None)
    exact = plan(0.0, (tokens - TEXT) / args.images - DELIMITERS)
    print(
        f"{args.questions} questions of {args.images} photographs, {tokens:,.0f} tokens each, read in chunks of {args.chunk}"
    )
    for label, value in (
        (f"planned for the longest prompt to be expected ({longest.longest:,} tokens)", longest.bytes),
        (f"planned for {exact.longest:,} tokens", exact.bytes),
        ("measured", measured),
    ):
        print(f"{value / 2**20:8.0f} MiB  {label}")
    print(f"planned / measured at these tokens: {exact.bytes / measured:.3f}")


def model_of(processor: Path, out: Path) -> Path:
    """A checkpoint with the files of `processor` beside random weights."""
    shape = published_config("Qwen/Qwen2.5-VL-3B-Instruct")
    text, vision = shape.get_text_config(), shape.vision_config
    text.hidden_size, text.num_hidden_layers, text.intermediate_size = 128, 4, 344
    text.num_attention_heads, text.num_key_value_heads, text.layer_types = 4, 2, text.layer_types[:4]
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 2, 64, 96, 4
    vision.out_hidden_size, vision.fullatt_block_indexes = 128, [1]
    model = meta_model(shape, "float32", device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(out)
    for file in processor.iterdir():
        if file.name in (
            "chat_template.json",
            "preprocessor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ):
            shutil.copy(file, out / file.name)
    return out


if __name__ == "__main__":
    main()
