"""laid's SFT and KD beside TRL's trainers, on the same prompts: CPU time of a step and a run, peak memory, losses.

    python bench/peers.py --questions results/small/haystacks/test/visual_haystack_20.json       prints the table for RESULTS.md

Needs TRL beside laid, in an environment of its own: pip install laid trl torchvision. Each run is a fork of one process that has
imported everything, so that peaks are of the run alone, and the four take turns, so that a change in the machine's load meets all
alike. Times are CPU times of one thread. All start from the same weights, take the same samples in the same order, pad to the
longest and step by AdamW without decay at one rate. TRL's KD is GOLD on given answers: lmbda 0, beta 0 (KL of the teacher to the
student), temperature 1; its DistillationTrainer trains on what the student generates and cannot do that. The line break that TRL
learns after each answer is taken from its labels. Prompts must be equal, token for token, and losses at every step to 0.1 %.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from unittest import mock

import torch
import trl
from datasets import Dataset, Image
from torch.utils.data import SequentialSampler
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback
from trl.experimental.gold import GOLDConfig, GOLDTrainer

from laid.cli import main as laid
from laid.data.chat import read_chats
from laid.io import write_json
from laid.training import recipe

RATE, BATCH = 1e-4, 8
RUNS = {
    "laid_sft": "laid, SFT",
    "trl_sft": "TRL SFTTrainer",
    "laid_kd": "laid, KD",
    "trl_gold": "TRL GOLDTrainer, KD",
}


class Watch:
    """CPU time between the ends of steps, and the highest memory, of this process."""

    def __init__(self) -> None:
        self.start = self.last = time.process_time()
        self.before, self.steps = peak(), []

    def step(self) -> None:
        now = time.process_time()
        self.steps.append(now - self.last)
        self.last = now

    def found(self, **more) -> dict:
        run = time.process_time() - self.start
        return {"run": run, "steps": self.steps[1:], "bytes": peak() - self.before, **more}


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_laid(method: str, args, folder: Path) -> dict:
    """`laid teacher-cache`, where there is a teacher, and `laid train`."""
    both = [
        "--config",
        args.config,
        "--coco",
        args.coco,
        "--questions",
        args.questions,
        "--threads",
        "1",
        "--device",
        "cpu",
    ]
    watch, prompts, losses, order = Watch(), [], [], []
    if method == "kd":
        laid(["teacher-cache", *both, "--teacher", args.teacher, "--out", str(folder / "cache")])
    teacher = time.process_time() - watch.start
    watch.last = time.process_time()
    original = recipe.training_step

    def step(t, indices, at):
        line = original(t, indices, at)
        watch.step()
        losses.append(line[f"loss_{'kl' if method == 'kd' else 'sft'}"])
        order.append(list(indices))
        prompts.extend(t.data.samples[k].prompt.ids.tolist() for k in indices)
        watch.last = time.process_time()
        return line

    cache = ["--teacher-cache", str(folder / "cache")] if method == "kd" else []
    with mock.patch.object(recipe, "training_step", step):
        laid(["train", *both, *cache, "--method", method, "--student-name", "small", "--student", args.student,
              "--out", str(folder / "seed0")])  # fmt: skip
    return watch.found(teacher=teacher, prompts=prompts, losses=losses, order=order)


def run_trl(method: str, args, folder: Path, order: list[list[int]]) -> dict:
    """SFTTrainer, or GOLDTrainer with a teacher that answers in every step."""
    watch, prompts, losses = Watch(), [], []
    rows = samples(args)
    table = Dataset.from_list([rows[k] for batch in order for k in batch])
    table = table.cast_column("images", [Image(mode="RGB")])
    processor = AutoProcessor.from_pretrained(args.student)
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")

    def plain(collate):
        def collated(examples):
            batch = collate(examples)
            batch["labels"][:, 1:][batch["input_ids"][:, :-1] == end] = -100
            masks = batch["attention_mask"].bool()
            prompts.extend(ids[mask].tolist() for ids, mask in zip(batch["input_ids"], masks, strict=True))
            return batch

        return collated

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            watch.step()

    settings = {
        "output_dir": str(folder / "trl"), "per_device_train_batch_size": BATCH, "max_steps": len(order), "learning_rate": RATE,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "use_cpu": True, "report_to": [], "save_strategy": "no",
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "bf16": False, "gradient_checkpointing": False,
        "max_length": None, "logging_steps": 1, "weight_decay": 0.0, "dataloader_pin_memory": False,
    }  # fmt: skip
    model = AutoModelForImageTextToText.from_pretrained(args.student)
    model.model.visual.requires_grad_(False)
    given = {"train_dataset": table, "processing_class": processor, "callbacks": [Clock()]}
    if method == "sft":
        trainer = trl.SFTTrainer(model, trl.SFTConfig(**settings), **given)
        trainer.data_collator = plain(trainer.data_collator)
    else:
        settings |= {"lmbda": 0.0, "beta": 0.0, "temperature": 1.0}
        teacher = AutoModelForImageTextToText.from_pretrained(args.teacher)
        trainer = GOLDTrainer(model, teacher, GOLDConfig(**settings), **given)
        trainer._vlm_collator = plain(trainer._vlm_collator)
        trainer._get_train_sampler = lambda dataset=None: SequentialSampler(
            table
        )  # it shuffles, whatever it is told
    original = trainer.training_step

    def step(*given, **named):
        loss = original(*given, **named)
        losses.append(float(loss))
        return loss

    trainer.training_step = step
    watch.last = time.process_time()
    trainer.train()
    trainer.save_model(str(folder / "model"))
    return watch.found(teacher=0.0, prompts=prompts, losses=losses)


def samples(args) -> list[dict]:
    """The questions as TRL takes them."""
    rows = []
    for chat in read_chats(args.questions):
        asked, answered = chat.turns
        content = [
            {"type": "image", "text": None} if p is None else {"type": "text", "text": p}
            for p in asked.content
        ]
        answer = [{"type": "text", "text": answered.text}]
        rows.append({
            "prompt": [{"role": "user", "content": content}], "completion": [{"role": "assistant", "content": answer}],
            "images": [f"{args.coco}/{name}" for name in chat.images],
        })  # fmt: skip
    return rows


def child(name: str, args, order, send) -> None:
    torch.set_num_threads(1)
    kind, method = name.split("_")
    with tempfile.TemporaryDirectory() as folder:
        run = (
            run_laid(method, args, Path(folder))
            if kind == "laid"
            else run_trl(method, args, Path(folder), order)
        )
    send.send(run)


def measured(name: str, args, order=None) -> dict:
    fork = multiprocessing.get_context("fork")
    receive, send = fork.Pipe(duplex=False)
    process = fork.Process(target=child, args=(name, args, order, send))
    process.start()
    send.close()
    found = receive.recv()
    process.join()
    return found


def check(ours: dict, theirs: dict) -> str:
    """Equal prompts and losses; raises SystemExit where they differ."""
    for a, b in zip(ours["prompts"], theirs["prompts"], strict=True):
        if a != b[: len(a)]:
            sys.exit("prompts differ")
    worst = max(abs(a - b) / abs(b) for a, b in zip(ours["losses"], theirs["losses"], strict=True))
    if worst > 1e-3:
        sys.exit(f"losses differ by up to {worst:.2%}: {ours['losses'][:3]} and {theirs['losses'][:3]}")
    return f"{worst:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", default="results/small", help="folder of a finished run: models, coco")
    parser.add_argument(
        "--questions", required=True, help="question file; its first --count questions are taken"
    )
    parser.add_argument("--count", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.student, args.teacher, args.coco = (
        f"{args.results}/{part}" for part in ("models/small", "models/teacher", "coco")
    )
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "questions.json"
        write_json(kept, json.loads(Path(args.questions).read_text())[: args.count])
        args.questions, args.config = str(kept), str(Path(folder) / "config.yaml")
        training = {
            "epochs": args.epochs,
            "batch_size": BATCH,
            "per_device_batch": BATCH,
            "lr": RATE,
            "schedule": "constant",
            "warmup": 0.0,
        }
        methods = {"sft": {"lora": None}, "kd": {"lambda_kl": 1.0, "lambda_sft": 0.0, "temperature": 1.0}}
        write_json(args.config, {"training": training, "methods": methods})
        runs = {name: [] for name in RUNS}
        for _ in range(args.repeats):
            for name in RUNS:
                runs[name].append(
                    measured(name, args, runs["laid_sft"][0]["order"] if runs["laid_sft"] else None)
                )
    worst = [check(runs["laid_sft"][0], runs["trl_sft"][0]), check(runs["laid_kd"][0], runs["trl_gold"][0])]
    tokens = [len(ids) for ids in runs["laid_sft"][0]["prompts"]]
    versions = ", ".join(
        f"{name} {metadata.version(name)}" for name in ("trl", "transformers", "torch", "accelerate")
    )
    print(
        f"{versions}; {args.count} questions of {min(tokens)} to {max(tokens)} tokens, {args.epochs} epochs, batches of {BATCH};"
    )
    print(
        f"medians of {args.repeats} runs; losses differ by at most {worst[0]} (SFT), {worst[1]} (KL) of their size\n"
    )
    print("| | step, ms | run, s | of it the teacher's pass | peak above start, MB |\n|---|--:|--:|--:|--:|")
    for name, said in RUNS.items():
        step, run, teacher, size = (
            statistics.median(statistics.median(r["steps"]) if key == "steps" else r[key] for r in runs[name])
            for key in ("steps", "run", "teacher", "bytes")
        )
        print(f"| {said} | {1000 * step:.0f} | {run:.1f} | {teacher:.1f} | {size / 2**20:.0f} |")


if __name__ == "__main__":
    main()
