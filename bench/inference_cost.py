"""Latency and FLOPs of an exported student beside base's, as JSON.

    python bench/inference_cost.py --config config.yaml --student-name small --model results/small/models/small \\
        --method laid --run results/small/runs/small/laid/seed0 --coco results/small/coco --questions results/small/haystacks/test \\
        --out results/small/inference_cost/small/laid.json
"""

import argparse
from pathlib import Path

from laid.analysis.inference_cost import measure
from laid.cli import ended
from laid.commands.shared import config_argument, deterministic, device_arguments, pick_device
from laid.io import write_json
from laid.settings import load

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
config_argument(parser)
parser.add_argument("--student-name", required=True)
parser.add_argument("--method", required=True)
parser.add_argument("--model", required=True, help="the base student's checkpoint")
parser.add_argument("--run", type=Path, required=True, help="run folder of the trained method")
parser.add_argument("--coco", type=Path, required=True)
parser.add_argument(
    "--questions", type=Path, required=True, help="folder of visual_haystack_<size>.json files"
)
parser.add_argument("--sizes", type=int, nargs="+", default=[20, 150])
parser.add_argument("--repeats", type=int, default=80)
parser.add_argument("--out", type=Path, required=True)
device_arguments(parser)
args = parser.parse_args()


def run() -> int:
    deterministic(args.threads)
    found = measure(
        load(args.config), args.student_name, args.method, args.model, args.run, args.coco, args.questions, args.sizes,
        args.repeats, pick_device(args.device),
    )  # fmt: skip
    write_json(args.out, found)
    for size, part in found["sizes"].items():
        low, high = part["interval"]
        print(
            f"{args.student_name} {args.method}, {size} images: FLOPs {part['flops'][1] / part['flops'][0]:.6f} times base's,"
            f" {found['clock']} {part['ratio']:.3f} [{low:.3f}, {high:.3f}] times"
        )
    return 0


raise SystemExit(ended("inference_cost", run))
