"""Step time and peak memory of SFT, KD and LAid, by number of tokens.

    python bench/distill_step.py                              CPU, small width, 1k to 16k tokens: 6 minutes on 2 cores
    python bench/distill_step.py --quick                      1k to 4k tokens: 1 minute
    python bench/distill_step.py --threads 1                  on a busy machine: CPU time of one thread instead of the clock
    python bench/distill_step.py --device cuda --shape 3b --apart     a GPU, real shapes (random weights)
    python bench/distill_step.py --write                      put the table into bench/RESULTS.md

Weights and inputs are random: neither changes what a step costs. A step is one sample: forward, losses, backward,
clipping, AdamW, as `laid train` does it, by the same code (laid.training.step). All methods train all weights of the
language model, so that SFT is the measure for the others. Memory: the peak of a process of its own, one method each, from
few tokens to many. Time: methods take their steps in turn in one process, so that a change in the machine's load meets all
alike, and the ratio to SFT is the median of ratios of neighbouring steps (--apart: in processes of their own, for large
models). Long inputs take fewer steps, at least three.
"""

from __future__ import annotations

import argparse
import json
import os
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
GAIN = {"gain": True, "alignment": {"pairs": [[0, 0], [-1, -1]]}}
METHODS = {  # name -> (what it is, settings, teacher)
    "sft": ("SFT", {}, None),
    "kd": ("KD, cached teacher", {"lambda_kl": 1.0}, "cache"),
    "laid": ("LAid, one layer pair, cached", {"lambda_kl": 1.0, **LAST}, "cache"),
    "laid_gain": ("LAid with gain, two layer pairs, cached", {"lambda_kl": 1.0, **LAST, **GAIN}, "cache"),
    "laid_online": ("LAid, online teacher", {"lambda_kl": 1.0, **LAST}, "online"),
    "naive": ("naive: output_attentions of both models", {}, "naive"),
    "teacher_pass": ("one teacher pass into the cache", {}, "pass"),
}


# ------------------------------------------------------------------ one measurement, in a process of its own


def measure(args) -> dict[str, dict]:
    """ "method tokens" -> {"seconds": [step, ...], "bytes": peak so far, "fixed": what does not depend on tokens}."""
    import torch

    from step_job import Job

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
            _, settings, kind = METHODS[method]
            counts, few = [64, *args.tokens], args.gradient_checkpointing
            jobs[method] = Job(SHAPES[args.shape], settings, kind, counts, dtype, args.device, place, few)
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
    """Timed steps: `steps` up to 4,096 tokens, fewer above, at least 3; none where none are asked for."""
    return min(steps, max(3, round(steps * 4096 / tokens)))


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
    spent = f"{' '.join(methods)}: {time.perf_counter() - start:.0f} s"
    if done.returncode:
        print(spent, file=sys.stderr, flush=True)
        why = (done.stderr.strip().splitlines() or ["killed, out of memory"])[-1][:120]
        if len(counts) > 1 and len(methods) == 1:  # the largest inputs may be the ones that do not fit
            fewer = _child(methods, counts[:-1], steps, args)
            return fewer | {(methods[0], counts[-1]): {"failed": why}}
        return {(method, tokens): {"failed": why} for method in methods for tokens in counts}
    parts = json.loads(done.stdout.splitlines()[-1])
    peaks = ", ".join(f"{key}: {value['bytes'] / 1e6:.0f} MB" for key, value in parts.items())
    print(spent if len(methods) > 1 else f"{spent}; {peaks}", file=sys.stderr, flush=True)
    return {(key.split()[0], int(key.split()[1])): value for key, value in parts.items()}


def table(results: dict[tuple[str, int], dict], args) -> str:
    """The section of RESULTS.md for these results."""
    about = f"{hardware(args.device, args.threads)}; {time.strftime('%Y-%m-%d')}; torch {_version('torch')},"
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
    lines = [line for method in ("laid", "laid_gain") for line in _against_sft(method, results, args)]
    shares = [(share, n) for n in args.tokens if (share := _share(results, n))]
    if shares:
        share, at = max(shares)
        lines.append(
            f"- 10 epochs from the cache, teacher pass included, target at most 0.45 of online: highest {share:.2f}, at {at}"
            f" tokens: {_verdict(share, 0.45)}. It is (r + 10) / (10 r + 10), r the teacher's pass over the student's step; the"
            " longer the input, the more attention weighs at this width, and the smaller r; in 3B and 32B, weights weigh more."
        )
    return lines


def _against_sft(method: str, results, args) -> list[str]:
    rows = [(n, results.get((method, n), {}), results.get(("sft", n), {})) for n in args.tokens]
    rows = [(n, a, b) for n, a, b in rows if a.get("ratio") and b.get("bytes")]
    if not rows:
        return []
    time_, where = max((a["ratio"], n) for n, a, _ in rows)
    memory, at = max((a["bytes"] / b["bytes"], n) for n, a, b in rows)
    above = {n: a["bytes"] - a["fixed"] for n, a, _ in rows}
    growth = [(above[n] / above[n // 2], n) for n in above if above.get(n // 2, 0) > 0]
    name = METHODS[method][0]
    lines = [
        f"- {name}, target at most 1.05 of SFT's time: highest {time_:.3f}, at {where} tokens: {_verdict(time_, 1.05)}.",
        f"- {name}, target at most 1.10 of SFT's memory: highest {memory:.3f}, at {at} tokens: {_verdict(memory, 1.1)}.",
    ]
    if growth:
        most, at = max(growth)
        lines.append(
            f"- {name}, memory above the fixed part on doubling the tokens, target at most 2.1 times: highest {most:.2f},"
            f" at {at} tokens: {_verdict(most, 2.1)}."
        )
    return lines


def _verdict(value: float, target: float) -> str:
    return "met" if value <= target else "missed"


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


def hardware(device: str, threads: int) -> str:
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    from laid.provenance import cost

    cores = cost(time.perf_counter())["hardware"]["cores"]
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
