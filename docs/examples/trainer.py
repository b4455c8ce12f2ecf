"""LAid inside transformers' Trainer: trainer.py STUDENT TEACHER chats.jsonl IMAGES OUT"""

import re
import sys

import pandas as pd
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, Trainer, TrainingArguments
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from laid import LaidLoss


class LaidTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.laid(model, self.teacher, inputs, self.state.global_step / self.state.max_steps)["loss"]


class Collator:
    def __init__(self, checkpoint, images):
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="right")
        self.processor, self.root = Qwen2VLImageProcessorPil.from_pretrained(checkpoint), images

    def __call__(self, rows):
        opened = [Image.open(f"{self.root}/{name}").convert("RGB") for row in rows for name in row["images"]]
        seen = self.processor(images=opened, return_tensors="pt")
        counts = iter((seen["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist())
        texts = [self.tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
        texts = [re.sub(r"<\|image_pad\|>", lambda m: m[0] * next(counts), text) for text in texts]
        batch = self.tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")
        ids, labels = batch["input_ids"], torch.full_like(batch["input_ids"], -100)
        turn, end, pad = self.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "<|image_pad|>"])
        assistant = self.tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
        for row, at in (ids == turn).nonzero().tolist():
            start = at + 1 + len(assistant)
            if ids[row, at + 1 : start].tolist() == assistant:
                answer = slice(start, start + (ids[row, start:] == end).nonzero()[0].item() + 1)
                labels[row, answer] = ids[row, answer]
        return {**batch, **seen, "mm_token_type_ids": (ids == pad).int(), "labels": labels}


def main(student, teacher, data, images, out):
    models = [AutoModelForImageTextToText.from_pretrained(name) for name in (student, teacher)]
    models[0].model.visual.requires_grad_(False)
    laid = LaidLoss(*models, lambda_laid=0.3, lambda_kl=0.3, lambda_sft=0.7, distance_strength=4.0)
    groups = [{"params": models[0].parameters(), "lr": 1e-5}, {"params": laid.parameters(), "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rows = pd.read_json(data, lines=True).to_dict("records")
    optimizer.register_step_post_hook(lambda *_: laid.zero_grad())  # Trainer clears the student's alone
    args = TrainingArguments(out, num_train_epochs=10, remove_unused_columns=False)
    trainer = LaidTrainer(models[0], args, Collator(student, images), rows, optimizers=(optimizer, None))
    trainer.teacher, trainer.laid = models[1].to(args.device).eval(), laid.to(args.device)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
