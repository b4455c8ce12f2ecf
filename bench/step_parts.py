"""What each part of LAid adds to a training step, timed alone, beside one step of SFT.

    python bench/step_parts.py                                CPU, small width, 1k to 16k tokens: half a minute
    python bench/step_parts.py --tokens 4096 --write          into bench/RESULTS.md

Parts: eq. 7 of one pair of layers, forward and backward; reading its teacher's heads from the cache; the gain of one
layer, forward and backward, as q_proj with it less q_proj without. CPU time of one thread, medians of nine (SFT:
of three up to 4,096 tokens, one step above). bench/distill_step.py measures whole steps, which take minutes; on a busy
machine the difference of two of them is within its noise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from distill_step import SHAPES, hardware, write
from laid.distill.alignment import HeadAlignment
from laid.distill.gain import RopeGain
from step_job import Job, build, write_cache

SHAPE = SHAPES["small"]
# pairs under eq. 7, layers with a gain
FORMS = {
    "one pair, no gain": (1, 0),
    "two pairs, gain in four layers": (2, 4),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--write", action="store_true", help="put the table into RESULTS.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lines = [
        "## small, cpu, what LAid adds, part by part",
        "",
        f"{hardware('cpu', 1)}; {time.strftime('%Y-%m-%d')}; torch {torch.__version__}; CPU time.",
        "",
        f"    python bench/step_parts.py --tokens {' '.join(map(str, args.tokens))}",
        "",
        "| tokens | SFT step, ms | eq. 7 of a pair, ms | reading it, ms | gain of a layer, ms | "
        + " | ".join(f"{form}: time / SFT" for form in FORMS)
        + " |",
        "|---" * (5 + len(FORMS)) + "|",
    ]
    steps = sft_steps(args.tokens)
    for tokens in args.tokens:
        pair, read, step = alignment(tokens), reading(tokens), steps[tokens]
        gain = gain_of_a_layer(tokens)
        ratios = [1 + (pairs * (pair + read) + layers * gain) / step for pairs, layers in FORMS.values()]
        cells = [
            f"{step:.0f}",
            *(f"{x:.1f}" for x in (pair, read, gain)),
            *(f"{x:.3f}" for x in ratios),
        ]
        lines.append(f"| {tokens} | {' | '.join(cells)} |")
    section = "\n".join(lines) + "\n"
    print(section)
    if args.write:
        write(section)


def spent(call: Callable[[], object], times: int = 9) -> float:
    """Milliseconds of CPU time, the median."""
    found = []
    for _ in range(times):
        start = time.process_time()
        call()
        found.append(1000 * (time.process_time() - start))
    return statistics.median(found)


def alignment(tokens: int) -> float:
    s, t = SHAPE["student"], SHAPE["teacher"]
    align = HeadAlignment(s["heads"], s["kv"], t["heads"], t["kv"], s["dim"], t["dim"])

    def heads(member, kind, dtype):
        # as projections lay them out
        return torch.randn(1, tokens, member[kind], member["dim"]).to(dtype).transpose(1, 2)

    own = [heads(s, kind, torch.float32).requires_grad_() for kind in ("heads", "kv")]
    theirs = [heads(t, kind, torch.bfloat16) for kind in ("heads", "kv")]
    mask, weights = torch.ones(1, tokens, dtype=torch.bool), torch.rand(1, tokens)
    return spent(lambda: align(*own, *theirs, mask, weights).backward())


def reading(tokens: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        teacher = SHAPE["teacher"]
        cache = write_cache(Path(folder), teacher, [64, tokens])
        return spent(lambda: cache.queries_keys(teacher["layers"] - 1, [1], tokens))


def gain_of_a_layer(tokens: int) -> float:
    model = build(SHAPE["student"], SHAPE, torch.float32, "cpu")
    text = model.model.language_model
    projection, hidden = text.layers[0].self_attn.q_proj, torch.randn(1, tokens, SHAPE["student"]["hidden"])
    bare = spent(lambda: projection(hidden).sum().backward())
    RopeGain(model).attach(model)  # its hooks hold it
    return spent(lambda: projection(hidden).sum().backward()) - bare


def sft_steps(counts: list[int]) -> dict[int, float]:
    """Tokens -> milliseconds of a step of SFT."""
    with tempfile.TemporaryDirectory() as folder:
        job = Job(SHAPE, {}, None, [64, *counts], torch.float32, "cpu", Path(folder), False)
        job.step(0)
        return {
            tokens: spent(lambda k=k: job.step(k), 3 if tokens <= 4096 else 1)
            for k, tokens in enumerate(counts, start=1)
        }


if __name__ == "__main__":
    main()
