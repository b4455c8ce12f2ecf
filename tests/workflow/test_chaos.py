"""The short form of `make chaos`: a few rules, killed three times."""

import os
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).resolve().parents[2]
TINY = """\
scale: tiny
data: {rendered: {train: 60, val: 60}}
haystacks:
  train: {questions: 8, min_size: 2, max_size: 3}
  validation: {questions: 2, sizes: [2]}
  test: {questions: 4, sizes: [1, 2]}
family: {pretrain: {threshold: 0, vision: {steps: 2}}, members: {small: {window: 3, steps: 3}}}
"""


@pytest.mark.workflow
@pytest.mark.slow
def test_a_killed_build_ends_in_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(TOP / "tools"))
    import chaos

    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TOP / "src"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "tiny.yaml").write_text(TINY)
    config = [TOP / "config.yaml", tmp_path / "tiny.yaml"]
    targets = [f"results/tiny/{name}" for name in ("haystacks/train.json", "models/small")]
    assert chaos.run(config, targets, kills=3, seed=7, cores=2, folder=tmp_path, others=()) == 0
    said = capsys.readouterr().out
    assert "1 x kill -9 of Snakemake alone" in said and said.endswith("files compared: the same bytes\n")
