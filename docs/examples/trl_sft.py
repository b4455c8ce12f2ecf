"""LAid inside TRL's SFTTrainer: trl_sft.py STUDENT TEACHER chats.jsonl IMAGES OUT (tried with TRL 1.16.0, transformers 5.23.0)"""

import sys

import torch
from datasets import Dataset, Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from trl import SFTConfig, SFTTrainer

from laid import LaidLoss


class LaidTrainer(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        ended = inputs["input_ids"] == self.processing_class.tokenizer.convert_tokens_to_ids("<|im_end|>")
        inputs["labels"][:, 1:][ended[:, :-1]] = -100  # TRL learns the line break of the template, too
        return self.laid(model, self.teacher, inputs, self.state.global_step / self.state.max_steps)["loss"]


def rows(data, images):
    """Conversations as prompt and completion: TRL masks what stands before the last answer."""
    table = Dataset.from_json(data)

    def split(row):
        *prompt, completion = row["messages"]
        names = [f"{images}/{name}" for name in row["images"]]
        return {"prompt": prompt, "completion": [completion], "images": names}

    table = table.map(split, remove_columns=["messages"])
    return table.cast_column("images", [Image(mode="RGB")])


def main(student, teacher, data, images, out):
    models = [AutoModelForImageTextToText.from_pretrained(name) for name in (student, teacher)]
    models[0].model.visual.requires_grad_(False)
    laid = LaidLoss(*models, lambda_laid=0.3, lambda_kl=0.3, lambda_sft=0.7, distance_strength=4.0)
    groups = [{"params": models[0].parameters(), "lr": 1e-5}, {"params": laid.parameters(), "lr": 1e-4}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    optimizer.register_step_post_hook(lambda *_: laid.zero_grad())  # Trainer clears the student's alone
    args = SFTConfig(out, num_train_epochs=10, max_length=None)  # an image must not be cut off
    trainer = LaidTrainer(
        models[0], args, train_dataset=rows(data, images), processing_class=AutoProcessor.from_pretrained(student),
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.teacher, trainer.laid = models[1].to(args.device).eval(), laid.to(args.device)
    trainer.model_accepts_loss_kwargs = False  # the loss is a mean over the batch
    trainer.train()


if __name__ == "__main__":
    main(*sys.argv[1:])
