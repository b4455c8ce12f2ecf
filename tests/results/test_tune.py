"""The choice of settings against numbers worked by hand."""

import csv
import io
import re

import pytest
import yaml

import synthetic
from laid.errors import LaidError
from laid.results.render import csv_text, markdown
from laid.results.tune import chosen_yaml, differences, read, scores, tune_table

TRIED = {
    "sft": [
        {"lr": 0.003, "epochs": 2, "lora": None},
        {"lr": 0.001, "epochs": 5, "lora": {"rank": 8}},
        {"lr": 0.001, "epochs": 2, "lora": None},
    ],
    "kd": [{"lr": 0.001}, {"lr": 0.002}],
    "yarn": [{"factor": 4.0}, {"factor": 2.0}],
}
# Short is 5 images, long 50 and 100. Of sft the mean of all sizes would choose the first; halves make all three equal.
CURVES = {
    ("7B", "base"): (0.8, 0.4, 0.4),
    ("3B", "base"): (0.8, 0.4, 0.4),
    ("7B", "sft_lr0p003_epochs2_lora_null"): (0.7, 0.7, 0.7),
    ("3B", "sft_lr0p003_epochs2_lora_null"): (0.6, 0.6, 0.6),
    ("7B", "sft_lr0p001_epochs5_lora_rank8"): (0.9, 0.6, 0.4),
    ("3B", "sft_lr0p001_epochs5_lora_rank8"): (0.8, 0.4, 0.4),
    ("7B", "sft_lr0p001_epochs2_lora_null"): (0.9, 0.6, 0.4),
    ("3B", "sft_lr0p001_epochs2_lora_null"): (0.8, 0.5, 0.3),
    ("7B", "kd_lr0p001"): (0.7, 0.5, 0.5),
    ("3B", "kd_lr0p001"): (0.5, 0.5, 0.5),
    ("7B", "kd_lr0p002"): (0.7, 0.7, 0.54),
    ("3B", "kd_lr0p002"): (0.5, 0.5, 0.5),
    ("7B", "yarn_factor4"): (0.5, 0.5, 0.5),
    ("3B", "yarn_factor4"): (0.5, 0.5, 0.5),
    ("7B", "yarn_factor2"): (0.4, 0.6, 0.6),
    ("3B", "yarn_factor2"): (0.5, 0.5, 0.5),
}
SIZES = [5, 50, 100]


def settings(sizes=SIZES, tried=TRIED, **more):
    return synthetic.config(
        more={"haystacks": {"validation": {"sizes": sizes}}, "tune": {"methods": tried}} | more
    )


def results(config, sizes=SIZES, curves=CURVES):
    grid = {model: dict(zip(sizes, curve, strict=False)) for model, curve in curves.items()}
    return read(synthetic.grid_of(grid, 100), config, "cells")


def test_scores_errors_and_the_choice_by_hand():
    frame = scores(results(settings()))
    assert list(frame.index) == list(dict.fromkeys(method for _, method in CURVES))
    first = frame.loc["sft_lr0p001_epochs5_lora_rank8"]
    assert (first["7B_short"], first["7B_long"], first["7B_score"]) == pytest.approx((90, 50, 70))
    # 70 and 60: mean 65, standard deviation 50 ** 0.5, over two students
    assert (first["mean"], first["error"]) == pytest.approx((65, 5))
    # three equal ones: fewer epochs, then the lower learning rate; of YaRN the lower factor
    chosen = ["sft_lr0p001_epochs2_lora_null", "kd_lr0p002", "yarn_factor2"]
    assert list(frame.index[frame["chosen"]]) == chosen
    assert frame.loc["yarn_factor4", "mean"] == pytest.approx(frame.loc["yarn_factor2", "mean"])
    # kd at 0.001 is 6 points behind on the one student, none on the other
    assert frame.loc["kd_lr0p001", ["to_chosen", "to_chosen_error"]].tolist() == pytest.approx([-3, 3])


@pytest.mark.parametrize(
    ("of_two", "of_five", "chosen"),
    [
        # behind nine epochs by 2 and 6 points, 4 with a standard error of 2, and by 1 and 5, 3 with one of 2
        ((0.68, 0.64), (0.69, 0.65), 9),
        # by 0 and 4, 2 with one of 2
        ((0.68, 0.64), (0.70, 0.66), 5),
        ((0.70, 0.66), (0.72, 0.66), 2),
    ],
)
def test_fewer_epochs_are_chosen_within_one_standard_error_of_the_best(of_two, of_five, chosen):
    tried = {"sft": [{"epochs": 9}, {"epochs": 5}, {"epochs": 2}]}
    curves = {(student, "base"): (0.5, 0.5) for student in ("7B", "3B")}
    for epochs, accuracies in ((2, of_two), (5, of_five), (9, (0.70, 0.70))):
        for student, accuracy in zip(("7B", "3B"), accuracies, strict=True):
            curves[student, f"sft_epochs{epochs}"] = (accuracy, accuracy)
    frame = scores(results(settings([5, 50], tried), [5, 50], curves))
    assert list(frame.index[frame["chosen"]]) == [f"sft_epochs{chosen}"]


def test_more_epochs_than_there_is_time_for_are_shown_and_not_chosen():
    tried = {"sft": [{"epochs": 9}, {"epochs": 5}, {"epochs": 2}], "yarn": TRIED["yarn"]}
    curves = {(student, "base"): (0.5, 0.5) for student in ("7B", "3B")}
    for name, of_7b in (("sft_epochs2", 0.6), ("sft_epochs5", 0.7), ("sft_epochs9", 0.9)):
        curves |= {("7B", name): (of_7b, of_7b), ("3B", name): (of_7b, of_7b)}
    curves |= {(student, f"yarn_factor{f}"): (0.5, 0.5) for student in ("7B", "3B") for f in (2, 4)}
    of_time = settings([5, 50], tried).changed({"tune": {"max_epochs": 5}})
    found = results(of_time, [5, 50], curves)
    frame = scores(found)
    assert list(frame.index[frame["chosen"]]) == ["sft_epochs5", "yarn_factor2"]
    assert frame.loc["sft_epochs9", "to_chosen"] == pytest.approx(20)
    assert "- Settings of more than 5 epochs are shown and not chosen" in markdown(tune_table(found, frame))
    with pytest.raises(LaidError, match="tune.methods.sft: no setting has at most 1 epochs"):
        scores(results(of_time.changed({"tune": {"max_epochs": 1}}), [5, 50], curves))


def test_the_table_says_what_was_tried_and_what_is_chosen():
    found = results(settings())
    table = tune_table(found, scores(found))
    rows = {row["variant"]: row for row in csv.DictReader(io.StringIO(csv_text(table)))}
    adapter = rows["sft_lr0p001_epochs5_lora_rank8"]
    assert (float(adapter["lr"]), float(adapter["epochs"])) == (0.001, 5)
    assert (adapter["adapter"], adapter["chosen"]) == ("LoRA rank 8, alpha 16", "False")
    assert float(rows["kd_lr0p002"]["epochs"]) == found.settings.training.epochs
    assert (rows["yarn_factor2"]["lr"], rows["yarn_factor2"]["other"]) == ("", "factor 2.0")
    text = markdown(table)
    bold = [re.split(r" *\| *", line)[1:3] for line in text.splitlines() if "**" in line and "|" in line]
    assert bold == [
        ["SFT", "**lr 0.001, 2 epochs, all weights**"],
        ["KD (ours)", f"**lr 0.002, {found.settings.training.epochs:g} epochs, all weights**"],
        ["YaRN", "**factor 2.0**"],
    ]
    assert "| 90.0 / 50.0 | 80.0 / 40.0 | 65.0 \u00b1 5.0 | +0.0 \u00b1 0.0 |" in text


def test_what_is_chosen_can_be_copied_and_is_held_against_the_configuration():
    sft = {"lr": 0.001, "epochs": 2, "lora": {"rank": 8}}
    config = settings(methods={"sft": sft}, training={"lr": 0.0005})
    frame = scores(results(config))
    chosen = yaml.safe_load(chosen_yaml(frame, config))
    assert chosen["methods"] == {"sft": TRIED["sft"][2], "kd": TRIED["kd"][1], "yarn": TRIED["yarn"][1]}
    assert differences(frame, config) == [
        "sft.lora is LoRA rank 8, alpha 16, chosen is null",
        "kd.lr is 0.0005, chosen is 0.002",
        "yarn.factor is 1.0, chosen is 2.0",
    ]
    assert differences(frame, config.changed(chosen)) == []


def test_one_window_counts_alone_and_one_student_has_no_error():
    config = settings(sizes=[5], tune={"methods": {"kd": TRIED["kd"]}, "students": ["7B"]})
    found = results(config, [5])
    frame = scores(found)
    # equal on 5 images: the lower learning rate
    assert list(frame.index[frame["chosen"]]) == ["kd_lr0p001"]
    assert frame.loc["kd_lr0p001", "mean"] == pytest.approx(70)
    text = markdown(tune_table(found, frame))
    assert "| 70.0 | **70.0** |  |" in text and "nan" not in text


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (settings(tried={"kd": [{"lr": 0.5}]}), "cells/7B/kd_lr0p5/5.json: no such cell (and 5 more cells)"),
        (settings(tried={}), "tune.methods names no method; give --config config.yaml configs/tune.yaml"),
    ],
)
def test_what_is_missing_is_said(config, said):
    with pytest.raises(LaidError, match=re.escape(said)):
        results(config)
