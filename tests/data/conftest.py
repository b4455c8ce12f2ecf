"""A small rendered COCO root, drawn once, and the shared real data where LAID_SHARED names them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from laid.data.render import render


@pytest.fixture(scope="session")
def coco_root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "coco"
    render(root, train=160, val=100, seed=3)
    return root


@pytest.fixture(scope="session")
def shared() -> Path:
    folder = os.environ.get("LAID_SHARED")
    if not folder:
        pytest.skip("LAID_SHARED is not set: no real COCO images and official questions at hand")
    return Path(folder)
