"""Step time and peak memory of SFT, KD and LAid, by number of tokens, each measured in a process of its own.

    python bench/distill_step.py                              CPU, small width, 1k to 16k tokens
    python bench/distill_step.py --device cuda --shape 3b     a GPU, real shapes (random weights)
    python bench/distill_step.py --write                      put the table into bench/RESULTS.md

Weights and inputs are random: neither changes what a step costs. A step is one sample: forward, losses, backward,
clipping, AdamW, as `laid train` does it, by the same code (laid.distill.losses). All methods train all weights of the
language model, so that SFT is the measure for the others. Rounds go through all methods in turn, so that a change in
the machine's load meets all alike; the median over rounds counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")

# heads, kv, dim: of attention. small: student and teacher stand to each other as 3B to 32B do (weights 1 to 8).
SHAPES = {
    "small": {
        "student": {"hidden": 128, "layers": 4, "heads": 4, "kv": 2, "dim": 32, "mlp": 256, "words": 1024},
        "teacher": {"hidden": 256, "layers": 8, "heads": 8, "kv": 4, "dim": 32, "mlp": 512, "words": 1024},
        "sections": (4, 6, 6),
        "image": (8, 12),
    },
    "3b": {
        "student": {"hidden": 2048, "layers": 36, "heads": 16, "kv": 2, "dim": 128, "mlp": 11008, "words": 151936},
        "teacher": {"hidden": 5120, "layers": 64, "heads": 40, "kv": 8, "dim": 128, "mlp": 27648, "words": 152064},
        "sections": (16, 24, 24),
        "image": (16, 22),
    },
    "7b": {
        "student": {"hidden": 3584, "layers": 28, "heads": 28, "kv": 4, "dim": 128, "mlp": 18944, "words": 152064},
        "teacher": {"hidden": 5120, "layers": 64, "heads": 40, "kv": 8, "dim": 128, "mlp": 27648, "words": 152064},
        "sections": (16, 24, 24),
        "image": (16, 22),
    },
}  # fmt: skip

LAST = {"lambda_laid": 0.3, "alignment": {"pairs": [[-1, -1]]}, "distance": {"strength": 4.0}}
GAIN = {"gain": {"length_aware": True}, "alignment": {"pairs": [[0, 0], [-1, -1]]}}
METHODS = {  # name -> (what it is, settings, teacher)
    "sft": ("SFT", {}, None),
    "kd": ("KD, cached teacher", {"lambda_kl": 1.0}, "cache"),
    "laid": ("LAid, cached teacher", {"lambda_kl": 1.0, **LAST}, "cache"),
    "laid_gain": ("LAid with gain, two layer pairs, cached", {"lambda_kl": 1.0, **LAST, **GAIN}, "cache"),
    "laid_online": ("LAid, online teacher", {"lambda_kl": 1.0, **LAST}, "online"),
    "naive": ("naive: output_attentions of both models", {}, "naive"),
    "teacher_pass": ("one teacher pass into the cache", {}, "pass"),
}


# ------------------------------------------------------------------ one measurement, in a process of its own


def measure(shape: str, method: str, tokens: int, steps: int, device: str, checkpointing: bool) -> dict:
    """{"seconds": median step, "bytes": peak, "fixed": what does not depend on tokens}; imports happen here."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(max(1, torch.get_num_threads()))
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    peak = Peak(torch, device)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(SHAPES[shape], method, [64, tokens], dtype, device, Path(folder), checkpointing)
        job.step(0)  # few tokens: weights, optimiser state and libraries are then in memory
        fixed = peak.now()
        job.step(1)
        spent = []
        for _ in range(steps):
            peak.sync()
            start = time.perf_counter()
            job.step(1)
            peak.sync()
            spent.append(time.perf_counter() - start)
        return {"seconds": statistics.median(spent), "bytes": peak.now(), "fixed": fixed}


class Peak:
    """Highest memory in use so far: of the process on a CPU, of the allocator on a GPU."""

    def __init__(self, torch, device: str):
        self.cuda = torch.cuda if device.startswith("cuda") else None

    def now(self) -> int:
        if self.cuda:
            return self.cuda.max_memory_allocated()
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def sync(self) -> None:
        if self.cuda:
            self.cuda.synchronize()


class Job:
    """A student, what it learns from, and an optimiser; sample k has counts[k] tokens."""

    def __init__(self, shape, method, counts, dtype, device, folder, checkpointing):
        import torch

        from laid.config import fill, merge
        from laid.distill.losses import Losses
        from laid.methods.decoder import text_model

        _, settings, kind = METHODS[method]
        trained = {"$ref": "#/$defs/trained_method"}
        self.settings, self.kind, self.device, self.folder = (
            merge(fill({}, trained), settings),
            kind,
            device,
            folder,
        )
        self.settings = fill(self.settings, trained)
        eager = kind == "naive"
        self.teacher_model = None
        if kind in ("online", "naive", "pass"):
            self.teacher_model = build(shape["teacher"], shape, dtype, device, eager).requires_grad_(False)
        self.shape, self.counts, self.dtype = shape, counts, dtype
        if kind == "pass":
            return
        self.model = build(shape["student"], shape, dtype, device, eager)
        if checkpointing:
            text_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.batches = [self._batch(shape["student"], count) for count in counts]
        self.losses = Losses(self.model, self.settings, self._teacher())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        parameters += [p for module in self.losses.modules().values() for p in module.parameters()]
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step(self, sample: int) -> None:
        import torch

        if self.kind == "pass":
            return self._teacher_pass(sample)
        inputs, labels = self.batches[sample]
        if self.kind == "naive":
            loss = self._naive(inputs, labels, sample)
        else:
            loss = self.losses.total(self.losses(inputs, labels, [sample], 0.5), 0.5)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return None

    def _batch(self, member, count):
        """(inputs, labels) of one sample of exactly `count` tokens: images as large as the shape's, then text."""
        import numpy as np
        import torch

        from laid.models.forward import collate
        from laid.models.prompts import EncodedPrompt, mrope_positions

        rng = np.random.default_rng([count, member["hidden"]])
        per_image = self.shape["image"][0] * self.shape["image"][1]
        images = max(0, count - 40) // (per_image + 2)
        suffix = count - 8 - images * (per_image + 2)
        mask = np.zeros(count, dtype=bool)
        starts = 8 + np.arange(images) * (per_image + 2)
        for start in starts:
            mask[start + 1 : start + 1 + per_image] = True
        ids = np.random.default_rng(count).integers(1, 512, count)
        positions = mrope_positions(8, [self.shape["image"]] * images, suffix)
        features = [
            torch.from_numpy(rng.standard_normal((per_image, member["hidden"]), dtype=np.float32)).to(
                self.dtype
            )
            for _ in range(images)
        ]
        inputs = collate([EncodedPrompt(ids, positions, starts, mask)], features)
        return inputs.to(self.device), torch.tensor([[7, 8]], device=self.device)

    def _teacher(self):
        if self.kind == "cache":
            return write_cache(self.folder, self.shape["teacher"], self.counts)
        if self.kind == "online":
            from laid.distill.online import OnlineTeacher

            seen = [self._batch(self.shape["teacher"], count)[0] for count in self.counts]
            return OnlineTeacher(self.teacher_model, [-1], lambda indices: seen[indices[0]])
        return None

    def _teacher_pass(self, sample: int) -> None:
        import torch
        from safetensors.torch import save_file

        from laid.distill.online import teacher_outputs

        inputs, _ = self._batch(self.shape["teacher"], self.counts[sample])
        logits, caught = teacher_outputs(self.teacher_model, inputs, (self.shape["teacher"]["layers"] - 1,))
        kept = {"logits": logits.float().cpu()}
        for qk in caught.values():
            for name, tensor in (("q", qk.q), ("k", qk.k)):
                kept[name] = tensor[0].transpose(0, 1).flatten(1).to(torch.bfloat16).cpu().contiguous()
        save_file(kept, self.folder / "pass.safetensors")

    def _naive(self, inputs, labels, sample):
        """What comes to mind first: both models give all attentions and all logits; rows are compared head mean to head mean."""
        from torch.nn import functional as F

        from laid.methods.decoder import text_model
        from laid.models.forward import embed

        def run(model, batch):
            out = text_model(model)(
                inputs_embeds=embed(model, batch),
                position_ids=batch.positions,
                use_cache=False,
                output_attentions=True,
            )
            return model.get_output_embeddings()(out.last_hidden_state), out.attentions

        import torch

        with torch.no_grad():
            batch, _ = self._batch(self.shape["teacher"], self.counts[sample])
            theirs, attended = run(self.teacher_model, batch)
        own, attentions = run(self.model, inputs)
        rows = min(own.shape[-1], theirs.shape[-1])
        loss = F.cross_entropy(own[:, -2:].float().flatten(0, 1), labels.flatten())
        loss = loss + F.kl_div(
            own[..., :rows].float().log_softmax(-1),
            theirs[..., :rows].float().softmax(-1),
            reduction="batchmean",
        )
        return loss + F.mse_loss(attentions[-1].mean(1).float(), attended[-1].mean(1).float())


def build(member, shape, dtype, device, eager=False):
    """A model of these sizes, random weights, a vision tower as small as can be."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": member["words"],
            "hidden_size": member["hidden"],
            "intermediate_size": member["mlp"],
            "num_hidden_layers": member["layers"],
            "num_attention_heads": member["heads"],
            "num_key_value_heads": member["kv"],
            "head_dim": member["dim"],
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(shape["sections"])},
            "bos_token_id": None,
            "eos_token_id": None,
        },
        vision_config={
            "depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": member["hidden"],
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=False,
        attn_implementation="eager" if eager else "sdpa",
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.model.visual.requires_grad_(False)
    return model


def write_cache(folder: Path, teacher, counts):
    """A TeacherCache of these sizes in `folder`, with random content, opened."""
    import torch
    from safetensors.torch import save_file

    from laid.distill.teacher_cache import FORMAT, TeacherCache
    from laid.io import write_json

    layers = [0, teacher["layers"] - 1]
    tensors = {"logits": torch.randn(len(counts), 2, teacher["words"])}
    for layer in layers:
        for name, heads in (("q", teacher["heads"]), ("k", teacher["kv"])):
            shape = (sum(counts), heads * teacher["dim"])
            tensors[f"{name}.{layer}"] = torch.randn(shape, dtype=torch.bfloat16)
    save_file(tensors, folder / "shard-00000.safetensors")
    index = {
        "format": FORMAT,
        "labelled": True,
        "layers": layers,
        "model_layers": teacher["layers"],
        "heads": teacher["heads"],
        "kv_heads": teacher["kv"],
        "head_dim": teacher["dim"],
        "lengths": list(counts),
        "shards": [{"file": "shard-00000.safetensors", "first": 0, "questions": len(counts), "sha256": ""}],
        "provenance": {"data": {"questions": ""}},
    }
    write_json(folder / "index.json", index)
    return TeacherCache(folder)


# ------------------------------------------------------------------ all measurements, and the table


def rounds(args) -> dict[tuple[str, int], dict]:
    """(method, tokens) -> medians over rounds; {"failed": why} where a method did not fit into memory."""
    raw: dict[tuple[str, int], list[dict]] = {}
    for number in range(args.rounds):
        for tokens in args.tokens:
            for method in args.methods:
                if method == "naive" and tokens > args.naive_up_to:
                    raw[method, tokens] = [{"failed": f"not run above {args.naive_up_to} tokens"}]
                    continue
                words = ["--child", method, "--tokens", str(tokens), "--steps", str(args.steps)]
                words += ["--shape", args.shape, "--device", args.device]
                words += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
                done = subprocess.run(
                    [sys.executable, __file__, *words], capture_output=True, text=True, check=False
                )
                if done.returncode:
                    found = {"failed": (done.stderr.strip().splitlines() or ["killed"])[-1][:120]}
                else:
                    found = json.loads(done.stdout.splitlines()[-1])
                raw.setdefault((method, tokens), []).append(found)
                print(f"round {number + 1}: {method} {tokens}: {found}", file=sys.stderr, flush=True)
    return {key: _median(found) for key, found in raw.items()}


def _median(found: list[dict]) -> dict:
    good = [f for f in found if "failed" not in f]
    if not good:
        return found[0]
    return {key: statistics.median(f[key] for f in good) for key in good[0]}


def table(results: dict[tuple[str, int], dict], args) -> str:
    """The section of RESULTS.md for these results."""
    about = f"{_hardware(args.device)}; {time.strftime('%Y-%m-%d')}; torch {_version('torch')},"
    about += (
        f" transformers {_version('transformers')}; median of {args.rounds} rounds of {args.steps} steps."
    )
    lines = [
        f"## {args.shape}, {args.device}",
        "",
        about,
        "",
        f"    {' '.join(['python', 'bench/distill_step.py', *[w for w in sys.argv[1:] if w != '--write']])}",
        "",
        "| method | tokens | step, ms | time / SFT | peak, MB | peak / SFT | above the fixed part, MB | growth on doubling |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method in args.methods:
        for tokens in args.tokens:
            found, sft = results[method, tokens], results.get(("sft", tokens), {})
            name = METHODS[method][0]
            if "failed" in found:
                lines.append(f"| {name} | {tokens} | {found['failed']} | | | | | |")
                continue
            half = results.get((method, tokens // 2), {})
            above, below = found["bytes"] - found["fixed"], half.get("bytes", 0) - half.get("fixed", 0)
            ratio = [
                f"{found[k] / sft[k]:.2f}" if sft.get(k) and method != "teacher_pass" else ""
                for k in ("seconds", "bytes")
            ]
            lines.append(
                f"| {name} | {tokens} | {1000 * found['seconds']:.0f} | {ratio[0]} | {found['bytes'] / 1e6:.0f} | {ratio[1]}"
                f" | {above / 1e6:.0f} | {f'{above / below:.2f}' if below > 0 else ''} |"
            )
    lines += ["", *_epochs(results, args)]
    return "\n".join(lines) + "\n"


def _epochs(results, args) -> list[str]:
    """Ten epochs from the cache, teacher pass included, against ten epochs online."""
    lines = []
    for tokens in args.tokens:
        cached, online, once = (
            results.get((m, tokens), {}).get("seconds") for m in ("laid", "laid_online", "teacher_pass")
        )
        if cached and online and once:
            share = (once + 10 * cached) / (10 * online)
            lines.append(
                f"- {tokens} tokens: 10 epochs from the cache, teacher pass included, cost {share:.2f} of online."
            )
    return lines


def _version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    from laid.provenance import cost

    cores = cost(time.perf_counter())["hardware"]["cores"]
    import os

    threads = os.environ.get("OMP_NUM_THREADS", "all")
    return f"{platform.machine()} CPU, {cores} cores, OMP_NUM_THREADS={threads}, load {os.getloadavg()[0]:.1f} at the end"


def write(section: str) -> None:
    """Replace (or add) the section of this heading in RESULTS.md."""
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.is_file() else "# Measured\n"
    heading = section.splitlines()[0]
    parts = ("\n" + text).split("\n## ")
    kept = [part for part in parts[1:] if part.splitlines()[0] != heading.removeprefix("## ")]
    body = [parts[0].strip("\n"), *(f"## {part.strip()}" for part in kept), section.strip()]
    RESULTS.write_text("\n\n".join(body) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process")
    parser.add_argument(
        "--naive-up-to", type=int, default=4096, help="tokens; its memory grows with their square"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--child", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        found = measure(
            args.shape, args.child, args.tokens[0], args.steps, args.device, args.gradient_checkpointing
        )
        print(json.dumps(found))
        return
    section = table(rounds(args), args)
    print(section)
    if args.write:
        write(section)


if __name__ == "__main__":
    main()
