"""Step time and peak memory of SFT, KD and LAid, by number of tokens.

    python bench/distill_step.py                              CPU, small width, 1k to 16k tokens: 6 minutes on 2 cores
    python bench/distill_step.py --quick                      1k to 4k tokens: 1 minute
    python bench/distill_step.py --threads 1                  on a busy machine: CPU time of one thread instead of the clock
    python bench/distill_step.py --device cuda --shape 3b --apart     a GPU, real shapes (random weights)
    python bench/distill_step.py --write                      put the table into bench/RESULTS.md

Weights and inputs are random: neither changes what a step costs. A step is one sample: forward, losses, backward,
clipping, AdamW, as `laid train` does it, by the same code (laid.distill.losses). All methods train all weights of the
language model, so that SFT is the measure for the others. Memory: the peak of a process of its own, one method each, from
few tokens to many. Time: methods take their steps in turn in one process, so that a change in the machine's load meets all
alike, and the ratio to SFT is the median of ratios of neighbouring steps (--apart: in processes of their own, for large
models). Long inputs take fewer steps, at least two.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")

# heads, kv, dim: of attention. small: student and teacher stand to each other as 3B to 32B do, in width, heads and MLP
# (1 to 2.5) and in layers (1 to 1.8), hence in weights (1 to 11).
SHAPES = {
    "small": {
        "student": {"hidden": 128, "layers": 4, "heads": 4, "kv": 1, "dim": 32, "mlp": 688, "words": 1024},
        "teacher": {"hidden": 320, "layers": 7, "heads": 10, "kv": 2, "dim": 32, "mlp": 1728, "words": 1024},
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


def measure(args) -> dict[str, dict]:
    """ "method tokens" -> {"seconds": [step, ...], "bytes": peak so far, "fixed": what does not depend on tokens}."""
    import torch

    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    # One thread's own time is what other processes disturb least; the time of several would count their waiting too.
    clock = time.process_time if args.threads == 1 and args.device == "cpu" else time.perf_counter
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    peak, found = Peak(torch, args.device), {}
    with tempfile.TemporaryDirectory() as folder:
        jobs = {}
        for method in args.child:
            place = Path(folder) / method
            place.mkdir()
            counts, few = [64, *args.tokens], args.gradient_checkpointing
            jobs[method] = Job(SHAPES[args.shape], method, counts, dtype, args.device, place, few)
            jobs[method].step(0)  # few tokens: weights, optimiser state and libraries are then in memory
        fixed = peak.now()
        for sample, tokens in enumerate(args.tokens, start=1):
            able = [method for method in jobs if can(method, tokens, args)]
            spent: dict[str, list[float]] = {method: [] for method in able}
            for number in range(steps_at(tokens, args.steps) + 1):
                for method in able:
                    peak.sync()
                    start = clock()
                    jobs[method].step(sample)
                    peak.sync()
                    if number:  # the first step warms up
                        spent[method].append(clock() - start)
            for method in able:
                found[f"{method} {tokens}"] = {"seconds": spent[method], "bytes": peak.now(), "fixed": fixed}
    return found


def steps_at(tokens: int, steps: int) -> int:
    """Timed steps: `steps` up to 4,096 tokens, fewer above, at least 2; none where none are asked for."""
    return min(steps, max(2, round(steps * 4096 / tokens)))


def can(method: str, tokens: int, args) -> bool:
    """Whether a method is measured at so many tokens."""
    return method != "naive" or tokens <= args.naive_up_to


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
        if kind in ("naive", "pass"):
            self.teacher_batches = [self._batch(shape["teacher"], count)[0] for count in counts]
        if kind == "pass":
            return
        self.asked = 0
        self.model = build(shape["student"], shape, dtype, device, eager)
        if checkpointing:
            text_model(self.model).gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.batches = [self._batch(shape["student"], count) for count in counts]
        self.losses = Losses(self.model, self.settings, self._teacher())
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        parameters += [p for module in self.losses.learned().values() for p in module.parameters()]
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
            # The online teacher keeps its last answer: ask it as for another sample each time.
            self.asked += len(self.counts)
            known = sample + self.asked if self.kind == "online" else sample
            loss = self.losses.total(self.losses(inputs, labels, [known], 0.5), 0.5)
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
            return OnlineTeacher(self.teacher_model, [-1], lambda indices: seen[indices[0] % len(seen)])
        return None

    def _teacher_pass(self, sample: int) -> None:
        import torch
        from safetensors.torch import save_file

        from laid.distill.online import teacher_outputs

        inputs = self.teacher_batches[sample]
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
            theirs, attended = run(self.teacher_model, self.teacher_batches[sample])
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
    """A TeacherCache of these sizes in `folder`, with random content, opened.

    Its one shard is written piece by piece, so that the peak of this process is that of its steps.
    """
    import torch

    from laid.distill.teacher_cache import FORMAT, TeacherCache
    from laid.io import write_json

    layers = [0, teacher["layers"] - 1]
    shapes = {"logits": ("F32", (len(counts), 2, teacher["words"]), 4)}
    for layer in layers:
        for name, heads in (("q", teacher["heads"]), ("k", teacher["kv"])):
            shapes[f"{name}.{layer}"] = ("BF16", (sum(counts), heads * teacher["dim"]), 2)
    header, at = {}, 0
    for name, (dtype, shape, width) in shapes.items():
        size = math.prod(shape) * width
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    with (folder / "shard-00000.safetensors").open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for dtype, shape, width in shapes.values():
            piece = torch.randn(1 << 16, dtype=torch.float32 if dtype == "F32" else torch.bfloat16)
            raw = piece.view(torch.uint8).numpy().tobytes()
            for start in range(0, math.prod(shape) * width, len(raw)):
                file.write(raw[: math.prod(shape) * width - start])
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


def everything(args) -> dict[tuple[str, int], dict]:
    """(method, tokens) -> {"seconds", "ratio" to SFT, "bytes", "fixed"} or {"failed": why}."""
    found: dict[tuple[str, int], dict] = {}
    for method in args.methods:
        found |= _child([method], args.tokens, args.steps if args.apart else 0, args)
    if not args.apart:
        able = [m for m in args.methods if not any("failed" in found.get((m, n), {}) for n in args.tokens)]
        times = _child(able, args.tokens, args.steps, args)
        for key in found:
            found[key] |= {"seconds": times.get(key, {}).get("seconds")}
    for (_, tokens), one in found.items():
        base = found.get(("sft", tokens), {}).get("seconds") or []
        one["samples"] = one.get("seconds") or []
        ratios = [a / b for a, b in zip(one["samples"], base)]
        one["ratio"] = statistics.median(ratios) if ratios else None
    for one in found.values():
        one["seconds"] = statistics.median(one["samples"]) if one["samples"] else None
    return found


def _child(methods: list[str], counts: list[int], steps: int, args) -> dict[tuple[str, int], dict]:
    words = ["--child", *methods, "--tokens", *map(str, counts), "--steps", str(steps)]
    words += ["--shape", args.shape, "--device", args.device, "--naive-up-to", str(args.naive_up_to)]
    words += ["--threads", str(args.threads)]
    words += ["--gradient-checkpointing"] if args.gradient_checkpointing else []
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    print(f"{' '.join(methods)}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["killed, out of memory"])[-1][:120]
        if len(counts) > 1 and len(methods) == 1:  # the largest inputs may be the ones that do not fit
            fewer = _child(methods, counts[:-1], steps, args)
            return fewer | {(methods[0], counts[-1]): {"failed": why}}
        return {(method, tokens): {"failed": why} for method in methods for tokens in counts}
    parts = json.loads(done.stdout.splitlines()[-1])
    return {(key.split()[0], int(key.split()[1])): value for key, value in parts.items()}


def table(results: dict[tuple[str, int], dict], args) -> str:
    """The section of RESULTS.md for these results."""
    about = f"{_hardware(args.device, args.threads)}; {time.strftime('%Y-%m-%d')}; torch {_version('torch')},"
    clock = "CPU time" if args.threads == 1 and args.device == "cpu" else "wall time"
    fewest = steps_at(max(args.tokens), args.steps)
    about += f" transformers {_version('transformers')}; {clock}, median of {args.steps} to {fewest} steps."
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
            found = results.get((method, tokens)) or {"failed": f"not run above {args.naive_up_to} tokens"}
            sft = results.get(("sft", tokens), {})
            name = METHODS[method][0]
            if "failed" in found:
                lines.append(f"| {name} | {tokens} | {found['failed']} | | | | | |")
                continue
            half = results.get((method, tokens // 2), {})
            above, below = found["bytes"] - found["fixed"], half.get("bytes", 0) - half.get("fixed", 0)
            ratio = ["", ""]
            if method != "teacher_pass" and "bytes" in sft:
                times = found.get("ratio")
                ratio = [f"{times:.2f}" if times else "", f"{found['bytes'] / sft['bytes']:.2f}"]
            step = f"{1000 * found['seconds']:.0f}" if found["seconds"] else ""
            lines.append(
                f"| {name} | {tokens} | {step} | {ratio[0]} | {found['bytes'] / 1e6:.0f} | {ratio[1]}"
                f" | {above / 1e6:.0f} | {f'{above / below:.2f}' if below > 0 else ''} |"
            )
    lines += ["", *_epochs(results, args), *_targets(results, args)]
    return "\n".join(lines) + "\n"


def _targets(results, args) -> list[str]:
    """What was aimed at, and whether it was met."""
    rows = [(n, results.get(("laid", n), {}), results.get(("sft", n), {})) for n in args.tokens]
    rows = [(n, a, b) for n, a, b in rows if a.get("ratio") and b.get("bytes")]
    if not rows:
        return []
    time_, where = max((a["ratio"], n) for n, a, _ in rows)
    memory, at = max((a["bytes"] / b["bytes"], n) for n, a, b in rows)
    above = {n: a["bytes"] - a["fixed"] for n, a, _ in rows}
    growth = [above[n] / above[n // 2] for n in above if above.get(n // 2, 0) > 0]
    lines = [
        f"- LAid from the cache (one layer pair, no gain), target at most 1.05 of SFT's time: highest {time_:.3f}, at {where} tokens.",
        f"- LAid from the cache (one layer pair, no gain), target at most 1.10 of SFT's memory: highest {memory:.3f}, at {at} tokens.",
    ]
    shares = [(share, n) for n in args.tokens if (share := _share(results, n))]
    if shares:
        share, at = max(shares)
        lines.append(
            f"- 10 epochs from the cache, teacher pass included, target at most 0.45 of online: highest {share:.2f}, at {at}"
            " tokens. It is (r + 10) / (10 r + 10), r the teacher's pass over the student's step; the longer the input, the more"
            " attention weighs at this width, and the smaller r; in 3B and 32B, weights weigh more."
        )
    if growth:
        lines.append(
            f"- The same: memory above the fixed part on doubling the tokens, target at most 2.1: highest {max(growth):.2f}."
        )
    return lines


def _epochs(results, args) -> list[str]:
    """Ten epochs from the cache, teacher pass included, against ten epochs online."""
    shares = {tokens: _share(results, tokens) for tokens in args.tokens}
    return [
        f"- {tokens} tokens: 10 epochs from the cache, teacher pass included, cost {share:.2f} of online."
        for tokens, share in shares.items()
        if share
    ]


def _share(results, tokens: int) -> float | None:
    cached, online, once = (
        results.get((m, tokens), {}).get("seconds") for m in ("laid", "laid_online", "teacher_pass")
    )
    return (once + 10 * cached) / (10 * online) if cached and online and once else None


def _version(name: str) -> str:
    from importlib import metadata

    return metadata.version(name)


def _hardware(device: str, threads: int) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    from laid.provenance import cost

    cores = cost(time.perf_counter())["hardware"]["cores"]
    import os

    return f"{platform.machine()} CPU, {cores} cores, {threads or 'all'} threads, load {os.getloadavg()[0]:.1f} at the end"


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
    parser.add_argument("--steps", type=int, default=9, help="timed steps, up to 4096 tokens; fewer above")
    parser.add_argument("--quick", action="store_true", help="1024 to 4096 tokens, 5 steps")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as cores")
    parser.add_argument("--apart", action="store_true", help="time every method in a process of its own")
    parser.add_argument(
        "--naive-up-to", type=int, default=2048, help="tokens; its memory grows with their square"
    )
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    parser.add_argument("--child", nargs="+", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.steps = [1024, 2048, 4096], 5
    args.tokens = sorted(args.tokens)
    if args.child:
        print(json.dumps(measure(args)))
        return
    section = table(everything(args), args)
    print(section)
    if args.write:
        write(section)


if __name__ == "__main__":
    main()
