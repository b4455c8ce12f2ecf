"""What named GPUs can hold and do: from the makers' data sheets, dense matrix products without sparsity."""

from __future__ import annotations

from dataclasses import dataclass

from laid.errors import LaidError

GIB = 2**30
USABLE = 0.95  # of a GPU's memory: the rest is for CUDA's context, libraries' workspaces and fragmentation


@dataclass(frozen=True)
class Gpu:
    """gib: memory as torch reports it. half, single: peak TFLOP/s in bfloat16 (or float16) and in float32."""

    name: str
    gib: float
    half: float
    single: float

    @property
    def usable(self) -> int:
        """Bytes a job may plan with."""
        return int(self.gib * GIB * USABLE)

    def rate(self, dtype: str) -> float:
        """Peak FLOP/s in that number format."""
        return 1e12 * (self.single if dtype == "float32" else self.half)


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("RTX4090-24GB", 23.6, 165.2, 82.6),
        Gpu("A100-40GB", 39.4, 312.0, 19.5),
        Gpu("L40S-48GB", 44.3, 362.0, 91.6),
        Gpu("A800-80GB", 79.2, 312.0, 19.5),  # the paper's: an A100 with slower links between GPUs
        Gpu("A100-80GB", 79.2, 312.0, 19.5),
        Gpu("H100-80GB", 79.1, 989.4, 66.9),
        Gpu("H200-141GB", 139.7, 989.4, 66.9),
        Gpu("B200-180GB", 178.3, 2250.0, 75.0),
    )
}


def gpu_named(name: str) -> Gpu:
    """One of GPUS, whatever its case. Raises LaidError for another name."""
    for known, gpu in GPUS.items():
        if known.lower() == name.lower():
            return gpu
    raise LaidError(f"no GPU {name!r} is known; known: {', '.join(GPUS)}")
