"""Training a member of the small-scale family from nothing, until it reads as many images as its window.

Two phases. First the language model, in embedding space: each visual token of an image is the sum of the
embeddings of the objects in it. Then the vision tower, on pixels, is aligned to those sums; its last block sees the
whole image. Pixels first, plain yes/no questions alone, or tokens that hold only the objects of their own part of the
image, stay on a plateau for more steps than the family has; what breaks it is hard negatives, several targets per
haystack, a question that lists the needle's objects, Muon, and supervision of the two intermediate steps: which
objects stand beside the anchor (read at the anchor's token) and whether the target is one of them (at the target's).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from laid import provenance
from laid.data.coco import CocoSplit, annotation_file, load_coco
from laid.data.haystacks import Haystack, HaystackSampler, training_paths
from laid.data.questions import question_text, with_article
from laid.distill.gaps import open_gaps
from laid.errors import LaidError
from laid.io import atomic_path, write_json
from laid.models import processing
from laid.models.decoder import text_model
from laid.models.loading import parameters
from laid.models.processing import Processor
from laid.models.prompts import OFFICIAL_PROMPT, mrope_positions
from laid.progress import Progress
from laid.settings import Settings
from laid.settings.family import Family, Member
from laid.toy.family import LIST_QUESTION, build_config, build_model, build_processor
from laid.toy.muon import Muon

# What a member's folder holds; a folder with anything else in it is not replaced.
FILES = (
    "laid.json", "pretrain.json", "config.json", "generation_config.json", "model*.safetensors*", *processing.FILES,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A shared haystack followed by several questions that do not see each other.

    All branches continue one stem, "... For the image with {anchor}, is there", at the same positions; the
    list question leaves it after the anchor. ids: (T,) template; positions: (3, 1, T); mask: (1, 1, T, T)
    additive; blocks: the token index of each image's <|vision_start|>; image (images * tokens an image,),
    anchor, target, answers, ends: token indices; at `answers` the answer is predicted (the last one is the
    list's), at `ends`, the given answers, the end of the turn.
    """

    ids: np.ndarray
    positions: Tensor
    mask: Tensor
    blocks: np.ndarray
    image: np.ndarray
    stem: slice
    branches: list[slice]
    listing: slice
    anchor: int
    target: int
    answers: np.ndarray
    ends: np.ndarray


class QuestionTree:
    """Builds layouts for one tokenizer and images of one merged grid (height, width), in visual tokens.

    Texts of all categories must have the same number of tokens.
    """

    def __init__(self, processor: Processor, categories: tuple[str, ...], grid: tuple[int, int] = (1, 1)):
        self.encoder, self.categories = processor.encoder, categories
        self.grid, self.tokens = grid, grid[0] * grid[1]
        self.yes, self.no = (self._one(word) for word in ("yes", "no"))
        self.category_ids = np.array([self._one(" " + name) for name in categories])
        first, second = categories[:2]
        self.prefix, after = self._ends("single", first, second)
        self.anchor = int(np.flatnonzero(after == self.category_ids[0])[0])
        self.stem_length = int(np.flatnonzero(after == self.category_ids[1])[0]) - 1  # up to "is there"
        self.branch_length = len(after) - self.stem_length + 1  # and the answer, after which the turn ends
        self.end = self.encoder.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.listing_length = len(self._list(first)) - self.anchor - 1

    def _one(self, text: str) -> int:
        ids = self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise LaidError(
                f"the tokenizer splits {text!r} into {len(ids)} tokens, expected 1: build it on them"
            )
        return ids[0]

    def _ends(self, mode: str, anchor: str, target: str) -> tuple[np.ndarray, np.ndarray]:
        return self.encoder.ends(OFFICIAL_PROMPT + question_text(mode, anchor, target))

    def _list(self, anchor: str) -> np.ndarray:
        return self.encoder.ends(OFFICIAL_PROMPT + LIST_QUESTION.format(anchor=with_article(anchor)))[1]

    @lru_cache(maxsize=256)  # noqa: B019 - one tree lives as long as its training
    def layout(self, images: int, questions: int) -> Layout:
        """The layout of `images` images, `questions` yes/no questions and the list question."""
        head, stem, branch, listing = (
            len(self.prefix),
            self.stem_length,
            self.branch_length,
            self.listing_length,
        )
        block = [self.encoder.start_id, *[self.encoder.pad_id] * self.tokens, self.encoder.end_id]
        blocks = head + len(block) * np.arange(images)
        start = head + len(block) * images
        total = start + stem + questions * branch + listing
        ids = np.zeros(total, dtype=np.int64)
        ids[:head] = self.prefix
        ids[head:start] = np.tile(block, images)
        place = np.arange(total)  # where each token stands in the prompt of its own question
        mask = np.tril(np.ones((total, total), dtype=bool))
        branches = [slice(at, at + branch) for at in range(start + stem, total - listing, branch)]
        for part in branches:
            place[part] = start + stem + np.arange(branch)
            mask[part, start + stem : part.start] = False
        tail = slice(total - listing, total)
        cut = start + self.anchor + 1
        place[tail] = cut + np.arange(listing)
        mask[tail, cut : tail.start] = False
        additive = torch.zeros(total, total).masked_fill(
            ~torch.from_numpy(mask), torch.finfo(torch.float32).min
        )
        positions = mrope_positions(head, [self.grid] * images, total - start)[:, place]
        return Layout(
            ids=ids,
            positions=torch.from_numpy(positions)[:, None],
            mask=additive[None, None],
            blocks=blocks,
            image=(blocks[:, None] + 1 + np.arange(self.tokens)).ravel(),
            stem=slice(start, start + stem),
            branches=branches,
            listing=tail,
            anchor=start + self.anchor,
            target=1,  # within a branch: the article, then the target
            answers=np.array([part.stop - 2 for part in branches] + [total - 1]),
            ends=np.array([part.stop - 1 for part in branches]),
        )

    def fill(self, layout: Layout, haystack: Haystack) -> np.ndarray:
        """Token ids (T,) of one haystack's questions in `layout`."""
        ids = layout.ids.copy()
        for part, (target, answer) in zip(layout.branches, haystack.targets):
            after = self._ends("single", haystack.anchor, target)[1]
            ids[layout.stem] = after[: self.stem_length]
            ids[part] = np.append(after[self.stem_length :], self.yes if answer else self.no)
        ids[layout.listing] = self._list(haystack.anchor)[self.anchor + 1 :]
        return ids


class Curriculum:
    """The largest haystack asked now: raised by `grow` whenever the running accuracy passes `threshold`."""

    def __init__(self, start: int, window: int, threshold: float, grow: float):
        self.largest, self.window, self.threshold, self.grow = (
            float(min(start, window)),
            window,
            threshold,
            grow,
        )
        self.accuracy = 0.5

    def draw(self, rng: np.random.Generator) -> int:
        """A size: the largest one with probability 0.3, else log-uniform below it."""
        if rng.random() < 0.3:
            return int(self.largest)
        return int(np.exp(rng.uniform(0.0, np.log(int(self.largest) + 0.999))))

    def update(self, accuracy: float) -> None:
        """Count one batch's accuracy."""
        self.accuracy = 0.95 * self.accuracy + 0.05 * accuracy
        if self.accuracy > self.threshold and self.largest < self.window:
            self.largest = min(self.window, max(self.largest + 1, self.largest * self.grow))
            self.accuracy = min(self.accuracy, self.threshold - 0.02)


def image_grid(processor: Processor, coco: CocoSplit) -> tuple[int, int]:
    """The merged grid (height, width), in visual tokens, of all images. Raises LaidError where they differ."""
    grids = {processor.grid(coco.images[p].width, coco.images[p].height, p): p for p in coco.labels}
    if len(grids) > 1:
        (a, first), (b, second) = list(grids.items())[:2]
        raise LaidError(
            f"{coco.root}: {first} makes {a[0]} x {a[1]} visual tokens, {second} {b[0]} x {b[1]}: pretraining takes images"
            " of one grid, crop them or lower family.image_pixels"
        )
    return grids.popitem()[0]


class Pretraining:
    """One member's training: `language`, then `vision`; `log` holds a line of numbers every so often."""

    def __init__(
        self,
        processor: Processor,
        coco: CocoSplit,
        family: Family,
        member: Member,
        name: str,
    ):
        self.processor, self.coco, self.settings, self.member, self.name = (
            processor, coco, family.pretrain, member, name,
        )  # fmt: skip
        self.model = build_model(build_config(processor, family, member), member.seed)
        self.text = text_model(self.model)
        self.tree = QuestionTree(processor, coco.categories, image_grid(processor, coco))
        self.sampler = HaystackSampler(
            coco.labels, coco.categories, self.settings.hard_negatives, [member.seed, 1]
        )
        index = {category: k for k, category in enumerate(coco.categories)}
        self.holds = np.zeros((len(self.sampler.paths), len(index)), dtype=np.float32)
        for row, path in enumerate(self.sampler.paths):
            self.holds[row, [index[c] for c in coco.labels[path]]] = 1.0
        self.rng = np.random.default_rng([member.seed, 2])
        self.gaps = np.random.default_rng([member.seed, 3])
        self.generator = torch.Generator().manual_seed(member.seed + 3)
        self.log: list[dict[str, float]] = []

    def bags(self) -> Tensor:
        """(categories, hidden): what one object adds to each visual token of its image."""
        return self.text.embed_tokens.weight[torch.from_numpy(self.tree.category_ids)]

    def language(self) -> None:
        """Phase 1: the language model, on sums of object embeddings."""
        s, text = self.settings, self.text
        nn.init.normal_(text.embed_tokens.weight, std=0.02, generator=self.generator)
        width = text.embed_tokens.weight.shape[1]
        beside, contained = nn.Linear(width, len(self.coco.categories)), nn.Linear(width, 1)
        for head in (beside, contained):
            nn.init.normal_(head.weight, std=0.02, generator=self.generator)
            nn.init.zeros_(head.bias)
        matrices = [p for _, p in text.layers.named_parameters() if p.ndim == 2]
        others = [p for p in text.parameters() if all(p is not m for m in matrices)]
        others += [self.model.lm_head.weight, *beside.parameters(), *contained.parameters()]
        optimizers = [
            Muon(matrices, lr=s.lr_muon),
            torch.optim.AdamW(others, lr=s.lr_adamw, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        ]
        peaks = [group["lr"] for o in optimizers for group in o.param_groups]
        curriculum = Curriculum(s.start_size, self.member.window, s.threshold, s.grow)
        layers: dict[int, Tensor] = {}
        hooks = [
            text.layers[k].register_forward_hook(
                lambda _m, _a, out, k=k: layers.__setitem__(k, out if torch.is_tensor(out) else out[0])
            )
            for k in (0, 1)
        ]
        steps = self.member.steps
        self.model.train()
        with Progress(steps, f"{self.name}: language", unit="steps") as bar:
            for step in range(steps):
                factor = min(1.0, (step + 1) / s.warmup_steps, (1 - step / steps) / s.decay)
                for group, peak in zip((g for o in optimizers for g in o.param_groups), peaks):
                    group["lr"] = peak * factor
                gapped = s.gapped if curriculum.largest > s.start_size else 0.0
                losses, accuracy = self._language_step(
                    curriculum.draw(self.rng), gapped, layers, beside, contained
                )
                for optimizer in optimizers:
                    optimizer.zero_grad(set_to_none=True)
                sum(losses.values()).backward()
                nn.utils.clip_grad_norm_(others, 1.0)
                for optimizer in optimizers:
                    optimizer.step()
                curriculum.update(accuracy)
                if step % 25 == 24 or step == steps - 1:
                    line = {k: round(float(v.detach()), 5) for k, v in losses.items()}
                    line |= {"accuracy": round(curriculum.accuracy, 4), "largest": int(curriculum.largest)}
                    self.log.append({"phase": "language", "step": step + 1, **line})
                    bar.update(0, loss=line["answer"], accuracy=line["accuracy"], largest=line["largest"])
                bar.update(1)
        for hook in hooks:
            hook.remove()
        self.model.eval()
        if curriculum.largest < self.member.window:
            raise LaidError(
                f"{self.name}: the curriculum stopped at {int(curriculum.largest)} of {self.member.window} images"
                f" after {steps} steps (running accuracy {curriculum.accuracy:.3f}, threshold {s.threshold}):"
                " give it more steps or another seed (family.members)"
            )

    def positions(self, layout: Layout, batch: int, gapped: float) -> Tensor:
        """(3, batch, T): the layout's positions, in a share `gapped` of the haystacks with gaps that span up to `reach`."""
        s, plain = self.settings, layout.positions[:, 0]
        starts, text = layout.blocks.tolist(), layout.stem.start
        return torch.stack(
            [
                open_gaps(plain, starts, text, s.reach, self.gaps)
                if s.reach and self.gaps.random() < gapped
                else plain
                for _ in range(batch)
            ],
            dim=1,
        )

    def _language_step(
        self,
        size: int,
        gapped: float,
        layers: Mapping[int, Tensor],
        beside: nn.Linear,
        contained: nn.Linear,
    ) -> tuple[dict[str, Tensor], float]:
        s = self.settings
        haystacks = [self.sampler.sample(size, s.targets) for _ in range(s.batch)]
        questions = max(len(h.targets) for h in haystacks)
        layout = self.tree.layout(size, questions)
        ids = torch.from_numpy(np.stack([self.tree.fill(layout, h) for h in haystacks]))
        held = torch.from_numpy(self.holds[np.stack([h.images for h in haystacks])])
        bags = (held @ self.bags()).repeat_interleave(self.tree.tokens, 1)
        noise = torch.randn(bags.shape, generator=self.generator)
        bags = bags + s.noise * bags.detach().std() * noise
        embeds = self.text.embed_tokens(ids).clone()
        embeds[:, layout.image] = bags
        hidden = self.text(
            inputs_embeds=embeds,
            position_ids=self.positions(layout, len(haystacks), gapped),
            attention_mask={"full_attention": layout.mask},
            use_cache=False,
        ).last_hidden_state
        logits = self.model.lm_head(hidden[:, layout.answers])
        ends = self.model.lm_head(hidden[:, layout.ends])
        label = torch.zeros(len(haystacks), questions, dtype=torch.bool)
        asked = torch.zeros(len(haystacks), questions)
        for row, haystack in enumerate(haystacks):
            for column, (_, answer) in enumerate(haystack.targets):
                label[row, column], asked[row, column] = answer, 1.0
        yes, no = asked * label, asked * ~label
        # Yes and no weigh the same, however many of each a batch holds.
        weight = 0.5 * yes / yes.sum().clamp(min=1) + 0.5 * no / no.sum().clamp(min=1)
        wanted = torch.where(label, self.tree.yes, self.tree.no)
        answer = F.cross_entropy(logits[:, :-1].flatten(0, 1), wanted.flatten(), reduction="none").view_as(
            weight
        )
        objects = held[torch.arange(len(haystacks)), torch.tensor([h.needle for h in haystacks])]
        anchors = torch.tensor([self.coco.categories.index(h.anchor) for h in haystacks])
        others = objects.scatter(1, anchors[:, None], 0.0)
        share = others / others.sum(1, keepdim=True).clamp(min=1)
        listed = (
            -(share * logits[:, -1].log_softmax(-1)[:, torch.from_numpy(self.tree.category_ids)])
            .sum(1)
            .mean()
        )
        at_anchor = beside(self.text.norm(layers[0][:, layout.anchor]))
        targets = torch.tensor([part.start + layout.target for part in layout.branches])
        at_target = contained(self.text.norm(layers[1][:, targets]))[..., 0]
        target_loss = F.binary_cross_entropy_with_logits(at_target, label.float(), reduction="none")
        losses = {
            "answer": (answer * weight).sum(),
            "list": listed,
            "beside": F.binary_cross_entropy_with_logits(at_anchor, objects),
            "contained": (target_loss * weight).sum(),
            "end": 0.1
            * F.cross_entropy(
                ends.flatten(0, 1), torch.full((ends.shape[0] * ends.shape[1],), self.tree.end)
            ),
        }
        right = (logits[:, :-1, self.tree.yes] > logits[:, :-1, self.tree.no]) == label
        return losses, float((right * weight).sum())

    def vision(self) -> float:
        """Phase 2: the vision tower, to the sums of object embeddings. Returns its error over their variance."""
        s = self.settings.vision
        visual = self.model.model.visual
        paths = self.sampler.paths
        with torch.no_grad():
            wanted = torch.from_numpy(self.holds) @ self.bags()
        spread = wanted.var()
        pixels = [self.processor.pixels([self.coco.file(path)])[0] for path in paths]
        merge = self.processor.image_processor.merge_size
        grid = torch.tensor([[1, merge * self.tree.grid[0], merge * self.tree.grid[1]]])
        optimizer = torch.optim.AdamW(
            visual.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        error = 1.0
        visual.train()
        with Progress(s.steps, f"{self.name}: vision", unit="steps") as bar:
            for step in range(s.steps):
                factor = min(1.0, (step + 1) / 20, (1 - step / s.steps) / 0.7)
                for group in optimizer.param_groups:
                    group["lr"] = s.lr * factor
                rows = self.rng.choice(len(paths), min(s.batch, len(paths)), replace=False)
                output = visual(
                    torch.cat([pixels[r] for r in rows]), grid_thw=grid.expand(len(rows), -1)
                ).pooler_output
                bags = wanted[torch.from_numpy(rows)].repeat_interleave(self.tree.tokens, 0)
                loss = F.mse_loss(output, bags) / spread
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(visual.parameters(), 1.0)
                optimizer.step()
                error = 0.9 * error + 0.1 * float(loss.detach())
                if step % 25 == 24 or step == s.steps - 1:
                    self.log.append({"phase": "vision", "step": step + 1, "error": round(error, 5)})
                bar.update(1, error=error)
        visual.eval()
        return error


def make_member(config: Settings, name: str, coco_root: str | Path, out: str | Path) -> dict[str, Any]:
    """Train member `name` on the train2017 images that no validation question uses; write it to `out`.

    The folder also holds pretrain.json (the training log) and laid.json (what it is and where it came from);
    the latter is returned. Raises LaidError for an unknown member or a curriculum that did not reach the
    window.
    """
    start = time.perf_counter()
    members = config.family.members
    if name not in members:
        raise LaidError(f"family.members has no {name!r}; it has {', '.join(members) or 'none'}")
    coco = load_coco(coco_root, "train2017")
    kept = training_paths(config.haystacks, coco)
    coco = dataclasses.replace(coco, labels={path: coco.labels[path] for path in kept})
    processor = build_processor(coco.categories, config.family.image_pixels)
    training = Pretraining(processor, coco, config.family, members[name], name)
    training.language()
    error = training.vision()
    record = {
        "parameters": parameters(training.model),
        "window": members[name].window,
        "vision_error": round(error, 5),
        "provenance": provenance.collect(
            "pretrain",
            config,
            {"annotations": annotation_file(coco_root, "train2017"), "images": (coco_root, kept)},
            member=name,
        ),
    }
    with atomic_path(out) as folder:
        training.model.save_pretrained(str(folder))
        processor.save(folder)
        write_json(folder / "pretrain.json", training.log)
        write_json(folder / "laid.json", record)
    write_json(Path(out).parent / f"{Path(out).name}.cost.json", provenance.cost(start))
    return record
