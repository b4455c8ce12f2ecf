"""The rules, through real Snakemake: what is planned, what is made again and why, how mistakes look."""

import re
from pathlib import Path

import pytest
import yaml

TOP = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.workflow


def test_every_path_in_a_shell_command_is_quoted():
    """A checkout, images or results may lie below a folder with a blank in its name."""
    for file in sorted((TOP / "workflow/rules").glob("*.smk")):
        bare = set(re.findall(r"\{((?:input|output|log|params)\b[\w.]*)\}", file.read_text()))
        # a flag; flags with their values, quoted where they are made
        assert bare <= {"params.kind", "params.cache", "params.asked"}, file.name
    stages = yaml.safe_load((TOP / "dvc.yaml").read_text())["stages"].values()
    assert not any(re.search(r"[^\"]\$\{results\}", stage["cmd"]) for stage in stages)


def expected_jobs(config):
    """rule -> jobs, counted from the configuration by hand rather than by the rules."""
    students, tables = config["models"]["students"], config["tables"]
    trained = 0
    evaluated = 1  # the teacher's base
    for student in students:
        methods = set(tables["methods"])
        if student == students[0 if tables["table3_student"] == "first" else -1]:
            methods |= set(tables["ablations"])
        evaluated += len(methods)
        trained += len(methods - {"base", "yarn", "self_extend"})
    rows = 1 + len(students) * len(tables["methods"])  # asked the test and the larger haystacks by one job
    return {
        "pretrain": 1 + len(students), "evaluate_rows": rows, "evaluate_test": evaluated - rows,
        "train": trained * config["seeds"],
    }  # fmt: skip


def test_plan_of_the_default(workdir):
    jobs = workdir.planned(overlay=None)
    expected = expected_jobs(yaml.safe_load((TOP / "config.yaml").read_text()))
    assert {rule: jobs[rule] for rule in expected} == expected
    assert (
        jobs["data"]
        == jobs["haystacks"]
        == jobs["haystacks_beyond"]
        == jobs["teacher_cache"]
        == jobs["tables"]
        == 1
    )


def test_three_seeds_train_three_times(workdir):
    config = yaml.safe_load((TOP / "config.yaml").read_text())
    jobs = workdir.planned("--config", "seeds=3", overlay=None)
    assert jobs["train"] == 3 * expected_jobs({**config, "seeds": 1})["train"]
    assert jobs["evaluate_rows"] == expected_jobs(config)["evaluate_rows"]


def test_one_cell_needs_one_student_and_one_run(workdir):
    jobs = workdir.planned("results/micro/cells/test/small/laid/5.json")
    assert (jobs["pretrain"], jobs["train"], jobs["evaluate_test"]) == (2, 1, 1)
    jobs = workdir.planned("results/micro/cells/test/small/yarn/5.json")
    assert (
        (jobs["pretrain"], jobs["evaluate_test"]) == (1, 1)
        and "train" not in jobs
        and "teacher_cache" not in jobs
    )


def test_one_job_per_cell_for_large_models(workdir):
    (workdir.path / "cell.yaml").write_text(
        "evaluation: {shard: cell, keep_features: true}\nresources: {evaluate: {gpu: 1, gpu_of: {teacher: 2}}}\n"
    )
    jobs = workdir.planned("--configfile", "micro.yaml", "cell.yaml", overlay=None)
    config = yaml.safe_load((TOP / "config.yaml").read_text())
    expected = expected_jobs(config)
    assert jobs["evaluate_test"] == 2 * (expected["evaluate_rows"] + expected["evaluate_test"])  # two sizes
    assert jobs["features"] == 3  # a pass of each vision tower before anything else needs it
    cell = "results/micro/cells/test/small/base/5"
    overlays = ["--configfile", "micro.yaml", "cell.yaml"]
    cells = [f"{cell}.json", "results/micro/cells/test/teacher/base/5.json"]
    plan = workdir.snakemake("--dry-run", "--printshellcmds", *cells, *overlays, overlay=None)
    # A cost file each: jobs of one folder do not write over each other's.
    assert f"output: {cell}.json, {cell}.cost.json" in plan and f" --cost '{cell}.cost.json'" in plan
    # A model that one GPU cannot hold asks for two, the others for none to leave idle.
    asked = re.findall(r"wildcards: student=(\w+), .*\n(?:.*\n)*?    resources: .*\bgpu=(\d)", plan)
    assert sorted(asked) == [("small", "1"), ("teacher", "2")]


def test_pope_asks_teacher_and_students_before_and_after(workdir):
    """Base of all three, and what follows it of each student; images are looked at where they are not rendered."""
    jobs = workdir.planned("pope")
    assert jobs.items() >= {"pope_questions": 1, "pope": 1, "evaluate_pope": 1 + 2 * 5}.items()
    assert "evaluate_test" not in jobs and "images" not in jobs
    (workdir.path / "fetched.yaml").write_text("data: {source: download}\n")
    jobs = workdir.planned("pope", "--configfile", "micro.yaml", "fetched.yaml", overlay=None)
    assert jobs["images"] == 2  # those of the haystacks, which the students learn from, and POPE's


def test_the_claims_rest_on_the_same_cells_whatever_was_made_before(workdir):
    """What lies in the folder of results is no part of the plan."""
    before = workdir.planned("page")
    (workdir.root / "pope").mkdir(parents=True)
    (workdir.root / "pope/pope.csv").write_text("")
    assert workdir.planned("page") == before and before["evaluate_pope"] == 11
    assert before["alignability"] == 2  # each student against the teacher


def test_a_method_of_an_overlay_is_a_method_like_any_other(workdir):
    """Named in tables.methods it is trained, evaluated and a row, and reads the teacher's cache where a loss needs it."""
    (workdir.path / "mine.yaml").write_text(
        "methods:\n  mine_2: {extends: laid, lambda_kl: 0.1}\n  apart: {extends: kd, lambda_kl: 0.0}\n"
        "tables: {methods: [base, mine_2, apart], ablations: [base]}\n"
        "training: {validation: {every: 2, sizes: [5]}}\n"
    )
    overlays = ["--configfile", "micro.yaml", "mine.yaml"]
    jobs = workdir.planned(*overlays, overlay=None)
    assert (jobs["train"], jobs["evaluate_test"], jobs["teacher_cache"]) == (4, 7, 1)
    plan = workdir.snakemake("--dry-run", "--printshellcmds", *overlays, overlay=None)
    (trained,) = re.findall(r" train .*--method mine_2 .*--student-name small .*", plan)
    assert "teacher_cache/train " in trained and "haystacks/train.json" in trained
    (trained,) = re.findall(r" train .*--method apart .*--student-name small .*", plan)
    assert " --validation results/micro/haystacks/validation/visual_haystack_5.json " in trained
    assert "--teacher-cache" not in trained and "haystacks/train.json" in trained


def test_tuning_trains_every_setting_on_every_pretrained_student(workdir):
    """Two of each student, one seed; base, YaRN and SelfExtend are only asked, and nothing is asked of the test."""
    (workdir.path / "twice.yaml").write_text("tune: {pretrained: 2}\n")
    overlays = ["--configfile", "micro.yaml", TOP / "configs/tune.yaml", "twice.yaml"]
    jobs = workdir.planned("tune", *overlays, overlay=None)
    tried = yaml.safe_load((TOP / "configs/tune.yaml").read_text())["tune"]["methods"]
    trained = 4 * sum(len(tried[method]) for method in tried.keys() - {"yarn", "self_extend"})
    asked = 4 * (1 + sum(map(len, tried.values())))
    assert {rule: jobs.get(rule) for rule in ("train", "evaluate_validation", "pretrain", "tune")} == {
        "train": trained,
        "evaluate_validation": asked,
        "pretrain": 5,
        "tune": 1,
    }
    assert "evaluate_test" not in jobs
    # The tables do not know of it.
    assert workdir.planned(*overlays, overlay=None) == workdir.planned()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "seedz=3"], "command line: seedz: unknown key; did you mean 'seeds'?"),
        (["--config", "seeds=0"], "command line: seeds = 0: must be at least 1"),
    ],
)
def test_wrong_configuration_is_said_before_anything_runs(workdir, words, said):
    output = workdir.snakemake(*words, ok=False)
    assert said in output and "Traceback" not in output
    assert not workdir.root.exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "haystacks: {neeedles: multi}",
            "bad.yaml, line 2: haystacks.neeedles: unknown key; did you mean 'needles'?",
        ),
        ("models: {checkpoints: {small: ./7b}}", "models.checkpoints.small = './7b': no such folder"),
        # Snakemake's own reader would end over it in a traceback.
        ("a: " + "[" * 3000, "snakemake: error: bad.yaml: nested more than 40 levels deep"),
    ],
)
def test_wrong_value_in_an_overlay_is_said_as_laid_says_it(workdir, text, said):
    (workdir.path / "bad.yaml").write_text(f"scale: bad\n{text}\n")
    output = workdir.snakemake(ok=False, overlay="bad.yaml")
    assert said in output and "Traceback" not in output


def test_what_is_made_again(shared_workdir):
    """Only a value that matters to a step makes it run again; comments and other keys do not."""
    work, target = shared_workdir, "results/micro/haystacks/train.json"
    work.snakemake(target)
    assert (work.root / "logs/haystacks.log").stat().st_size > 0
    assert work.planned(target) == {}

    base = (work.path / "config.yaml").read_text()
    (work.path / "config.yaml").write_text("# a comment\n" + base)
    assert work.planned(target) == {}
    assert work.planned(target, "--config", "seeds=2") == {}

    micro = (work.path / "micro.yaml").read_text()
    (work.path / "seed.yaml").write_text(micro.replace("haystacks:", "haystacks:\n  seed: 5"))
    assert work.planned(target, overlay="seed.yaml") == {"haystacks": 1}
    (work.path / "data.yaml").write_text(micro.replace("train: 240", "seed: 5, train: 240"))
    assert work.planned(target, overlay="data.yaml") == {"data": 1, "haystacks": 1}


def test_a_failing_step_fails_the_run_with_one_line(shared_workdir):
    """The log is written through a pipe: a failure before the pipe must not be lost."""
    work = shared_workdir
    (work.path / "few.yaml").write_text(
        (work.path / "micro.yaml").read_text().replace("[1, 5]", "[1, 5, 400]")
    )
    target = "results/micro/haystacks/test/visual_haystack_400.json"
    output = work.snakemake(target, ok=False, overlay="few.yaml")
    log = (work.root / "logs/haystacks.log").read_text()
    assert "laid haystacks: error: " in log and log.strip().count("\n") == 0 and log.strip() in output
    assert not (work.path / target).exists()
