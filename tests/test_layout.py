"""Where results lie and what they are made from."""

import pytest
import yaml

from laid.data.pope import STRATEGIES, pope_file
from laid.data.questions import haystack_file
from laid.errors import LaidError
from laid.layout import Layout
from laid.settings import load


@pytest.fixture
def layout(tmp_path):
    overlay = {
        "models": {"checkpoints": {"teacher": "owner/name"}},
        "methods": {"mine": {"extends": "laid_plus"}},
        "tables": {"methods": ["base", "yarn", "sft", "mine"], "ablations": ["base", "laid"]},
    }
    (tmp_path / "over.yaml").write_text(yaml.safe_dump(overlay))
    return Layout(load(["config.yaml", tmp_path / "over.yaml"]))


def test_suites_name_the_files_that_the_builders_write(layout):
    assert [name for name in layout.suites if name.startswith("pope_")] == [f"pope_{s}" for s in STRATEGIES]
    for strategy in STRATEGIES:
        file = pope_file("results/small/pope/questions", strategy)
        assert layout.questions(f"pope_{strategy}", 1) == str(file)
    assert layout.questions("test", 50) == str(haystack_file("results/small/haystacks/test", 50))
    assert layout.suites["validation"].seeds == 3 and layout.suites["test"].seeds == 1
    assert [suite.folder for suite in layout.suites.values()] == ["haystacks"] * 2 + ["beyond"] + ["pope"] * 3


def test_a_published_checkpoint_is_no_folder_of_ours(layout):
    assert (layout.given("teacher"), layout.checkpoint("teacher")) == ("owner/name", "owner/name")
    assert (layout.given("small"), layout.checkpoint("small")) == (None, "results/small/models/small")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("Qwen/Qwen2.5-VL-7B", None),
        ("mine/7b", False),
        ("mien/7b", "did you mean mine/7b"),
        ("mine/7", "did you mean mine/7b"),
        ("/absent/7b", "a hub id has the form owner/name"),
        ("7b", "a hub id has the form owner/name"),
    ],
)
def test_a_mistyped_folder_is_no_hub_id(layout, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine/7b").mkdir(parents=True)
    ours = Layout(layout.settings.changed({"models": {"checkpoints": {"small": given}}}))
    if isinstance(said, str):
        with pytest.raises(LaidError, match=f"models.checkpoints.small = '{given}': no such folder; {said}"):
            ours.hub_id("small")
    else:
        assert ours.hub_id("small") is (said is None) and not ours.hub_id("medium")


def test_home_is_spelt_out(layout, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    ours = layout.settings.changed(
        {"models": {"checkpoints": {"small": "~/small"}}, "data": {"source": "local", "root": "~/coco"}}
    )
    assert (Layout(ours).checkpoint("small"), Layout(ours).coco) == ("/home/me/small", "/home/me/coco")


def test_the_teacher_is_asked_where_a_method_of_tables_or_sweep_hears_it():
    alone = {"tables": {"methods": ["base", "sft"], "ablations": ["base"]}, "sweep": {"against": ["sft"]}}
    settings = load(["config.yaml"]).changed(alone)
    assert not Layout(settings).needs_cache()
    assert Layout(settings.changed({"sweep": {"methods": ["kd"]}})).needs_cache()
    assert Layout(settings.changed({"tables": {"ablations": ["base", "laid"]}})).needs_cache()


def test_what_tuning_asks_for():
    tried = {"laid_plus": [{"lr": 0.5}], "yarn": [{"factor": 3.0}]}
    tune = {"students": ["small"], "pretrained": 2, "methods": tried}
    settings = load(["config.yaml"]).changed({"tune": tune, "haystacks": {"validation": {"sizes": [50, 5]}}})
    layout = Layout(settings)
    assert layout.members == ["teacher", "medium", "small"] and layout.known == [*layout.members, "small_1"]
    assert layout.needed_by_tune() == [
        layout.cell("validation", student, method, size)
        for student in ("small", "small_1")
        for method in ("base", "laid_plus_lr0p5", "yarn_factor3")
        for size in (5, 50)
    ]
    assert not [cell for cell in layout.needed() if "small_1" in cell or "lr0p5" in cell]


def test_which_methods_are_trained_and_hear_the_teacher(layout):
    assert [layout.hears_teacher(m) for m in ("sft", "kd", "laid", "mine")] == [False, True, True, True]
    assert [layout.is_trained(m) for m in ("base", "yarn", "self_extend", "sft", "mine")] == [False] * 3 + [
        True
    ] * 2
    assert layout.runs("small", "mine", 2) == [f"results/small/runs/small/mine/seed{k}" for k in (0, 1)]
    assert layout.runs("small", "yarn", 2) == []


def test_students_that_equation_7_is_to_pull_to_the_teacher():
    def aligned(methods, ablations):
        asked = {"methods": ["base", *methods], "ablations": ["base", *ablations]}
        return Layout(load(["config.yaml"]).changed({"tables": asked})).aligned()

    assert aligned(["kd", "laid"], []) == ["medium", "small"]
    assert aligned(["kd"], ["laid"]) == ["small"]  # Table 3 is of the last student
    assert aligned(["sft", "kd"], ["laid_wo_laid"]) == []


def test_what_the_tables_ask_for(layout):
    cells = layout.needed()
    # laid for the last student alone; Table 1's rows beyond the test sizes too
    assert len(cells) == len(set(cells)) == 8 * (1 + 2 * 4 + 1) + 3 * (1 + 2 * 4)
    assert layout.needed("teacher") == [
        layout.cell(suite, "teacher", "base", size)
        for suite in ("test", "beyond")
        for size in layout.suites[suite].sizes
    ]
    off = Layout(layout.settings.changed({"beyond": {"table": False}}))
    assert off.needed() == cells[: 8 * (1 + 2 * 4 + 1)]
    assert layout.chosen("pope", "medium") == ["base", "sft"]
    assert layout.chosen("pope", "small") == ["base", "sft", "laid"]
    files = layout.question_files("haystacks")
    assert files[0] == layout.training_questions and len(files) == 1 + 8 + 4
    assert len(layout.question_files("beyond")) == len(layout.question_files("pope")) == 3
