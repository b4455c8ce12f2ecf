"""A pytest plugin (-p cpu_torchvision, with PYTHONPATH=tests): PyPI's torchvision beside a CPU's torch.

TRL's processor wants torchvision, which transformers imports wherever it finds it. Its kernels are built for CUDA and do not load
there; two of them are looked for on import, so they are declared, and none is called.
"""

import torch

KERNELS = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    KERNELS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
