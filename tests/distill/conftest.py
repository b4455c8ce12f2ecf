"""Distillation tests share the tiny models of tests/methods."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "methods"))
