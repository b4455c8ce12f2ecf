"""What an exported student costs at inference beside the base student: FLOPs counted, latency measured in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from laid import provenance
from laid.data.questions import haystack_file, read_questions
from laid.evaluation.evaluate import Evaluator
from laid.methods.registry import load_with_method
from laid.models.forward import collate, generate
from laid.models.loading import parameters, source_of
from laid.settings import Settings

FORMAT = "laid-inference-cost/1"
NEW_TOKENS, NO_TOKEN = 4, -1  # nothing stops an answer early
# torch counts attention on CUDA only; the CPU kernels do the same products.
COUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(
        q, k, v
    ),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}


def count_flops(work: Callable[[], Any]) -> int:
    """Floating point operations of the matrix products in work(), attention included (as if it were not causal)."""
    with FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
        work()
    return counter.get_total_flops()


def time_in_turns(works: Sequence[Callable[[], Any]], repeats: int, device: str) -> np.ndarray:
    """(repeats, works) seconds, after one warm-up each; the order is reversed every other time, so that drift cancels.

    On a CPU the process's own time counts, which other processes on the machine disturb least; on CUDA wall time.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    for work in works:
        work()
    seconds = np.zeros((repeats, len(works)))
    for turn in range(repeats):
        order = range(len(works)) if turn % 2 == 0 else reversed(range(len(works)))
        for which in order:
            _wait(device)
            start = clock()
            works[which]()
            _wait(device)
            seconds[turn, which] = clock() - start
    return seconds


def ratio_interval(seconds: np.ndarray, resamples: int = 2000) -> tuple[float, float, float]:
    """(ratio, low, high): median over turns of second work / first, with its 95 % bootstrap interval."""
    ratios = seconds[:, 1] / seconds[:, 0]
    rng = np.random.default_rng([0, len(ratios)])
    draws = np.median(ratios[rng.integers(0, len(ratios), (resamples, len(ratios)))], axis=1)
    return float(np.median(ratios)), *(float(v) for v in np.quantile(draws, [0.025, 0.975]))


@torch.inference_mode()
def measure(
    config: Settings,
    student: str,
    method: str,
    model: str | Path,
    run: str | Path,
    coco_root: str | Path,
    questions: str | Path,
    sizes: Sequence[int],
    repeats: int = 80,
    device: str = "cpu",
) -> dict[str, Any]:
    """Answer one question of each size with base and with the exported run: prefill and NEW_TOKENS further tokens.

    The vision tower is left out of the clock and compared instead: `same_vision` says that its weights are untouched.
    """
    loaded = [load_with_method(config, m, model, r, device) for m, r in (("base", None), (method, run))]
    states = [one.model.model.visual.state_dict() for one in loaded]
    by_size = {}
    for size in sizes:
        question = read_questions(haystack_file(questions, size))[0]
        works = []
        for one in loaded:
            evaluator = Evaluator(one, coco_root, config.evaluation)
            (asked,) = evaluator.ask([question])
            inputs = collate([asked.prompt], evaluator.features.get(asked.paths)).to(device)
            works.append(lambda one=one, inputs=inputs: generate(one.model, inputs, NEW_TOKENS, [NO_TOKEN]))
        seconds = time_in_turns(works, repeats, device)
        ratio, low, high = ratio_interval(seconds)
        by_size[str(size)] = {
            "tokens": len(asked.prompt.ids),
            "flops": [count_flops(work) for work in works],
            "seconds": [float(v) for v in np.median(seconds, axis=0)],
            "ratio": ratio,
            "interval": [low, high],
        }
    return {
        "format": FORMAT,
        "student": student,
        "method": method,
        "clock": "process time" if device == "cpu" else "wall time",
        "device": device,
        "repeats": repeats,
        "new_tokens": NEW_TOKENS,
        "parameters": [parameters(one.model) for one in loaded],
        "same_vision": states[0].keys() == states[1].keys()
        and all(torch.equal(states[0][k], states[1][k]) for k in states[0]),
        "sizes": by_size,
        "provenance": provenance.collect(
            "evaluate",
            config,
            {"model": source_of(model), "run": Path(run) / "model"},
            student=student,
            method=method,
        ),
    }


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
