"""`laid rehearse` at toy size: every kind of job once, its plan beside it."""

from laid.cli import main
from laid.io import read_json


def test_every_kind_of_job_is_rehearsed(micro_file, tmp_path, capsys):
    less = tmp_path / "less.yaml"
    less.write_text(
        "evaluation: {scoring: generate, chunk_tokens: 16, keep_features: true}\n"
        "training: {per_device_batch: 1, tokens_per_pass: 400}\n"
        "tables: {methods: [base, self_extend, laid], ablations: [base, laid]}\n"
    )
    code = main(["rehearse", "--config", str(micro_file), str(less), "--out", str(tmp_path / "r")])
    out, err = capsys.readouterr()
    rows = read_json(tmp_path / "r/rehearsal.json")
    assert code == 0, (err, rows)
    assert {(r["rule"], r["student"], r["method"]) for r in rows} == {
        ("features", "teacher", ""), ("features", "small", ""), ("teacher_cache", "teacher", ""),
        ("train", "small", "laid"), ("evaluate", "teacher", "base"),
        *(("evaluate", "small", method) for method in ("base", "self_extend", "laid")),
    }  # fmt: skip
    assert all(r["planned"] > 0 and r["seconds"] > 0 and r["hours"] > 0 and not r["failed"] for r in rows)
    assert "Rehearsal" in out and "Planned GiB" in out
