# What all rules share: the validated settings, where results lie, what a job may use.
# Where things lie and what depends on what is laid.layout: plain Python, with tests of its own.
import shlex
from pathlib import Path

from snakemake.exceptions import WorkflowError

from laid.errors import LaidError
from laid.io import sha256_json
from laid.layout import Layout
from laid.results.names import LAID
from laid.settings import load, resolved_file, slice_json

try:
    # Read again as laid reads YAML, config.yaml first: a message then says where a value stands.
    overlays = workflow.overwrite_configfiles
    base = [file for file in workflow.configfiles if file not in overlays]
    config = load([*base, *overlays], workflow.config_settings.config)
    LAYOUT = Layout(config)
    CELLS = LAYOUT.needed()
    HUB = [member for member in LAYOUT.known if LAYOUT.hub_id(member)]
except LaidError as error:
    raise WorkflowError(str(error)) from None

# Every job reads the resolved configuration, `--config` and all, from a file named by its content. It is no input of
# any rule: what makes a rule run again is the slice of values in its params.
# Where the checkout lies is no param either: in a clone elsewhere nothing needs to run again.
shell.prefix(
    f"set -euo pipefail; CONFIG={resolved_file(config, '.snakemake/laid')}; HERE={shlex.quote(str(workflow.basedir))};"
    ' BENCH="$HERE"/bench;'
    f' LAYOUT="$HERE"/configs/accelerate/{config.training.parallel}.yaml;'
    # a stopped run has time to write its checkpoint
    " export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=3600; "
)

ROOT, COCO, SUITES = LAYOUT.root, LAYOUT.coco, LAYOUT.suites
MEMBERS = LAYOUT.members
TEACHER, STUDENTS = MEMBERS[0], MEMBERS[1:]
TEST = SUITES["test"].sizes


wildcard_constraints:
    member="|".join(LAYOUT.known),
    student="|".join(LAYOUT.known),
    method="|".join(config.methods),
    asked="haystacks|beyond|pope",
    seed=r"\d+",
    size=r"\d+",


def relevant(step):
    """params: the values that the result of `step` depends on; another value there, and the job runs again."""
    return lambda wildcards: slice_json(step, config, **dict(wildcards))


def above(path, levels=1):
    """The folder `levels` above a file."""
    return str(Path(path).parents[levels - 1])


def cores(rule):
    """threads: what config.yaml grants a job of `rule`."""
    return getattr(config.resources, rule).threads


def ask(rule, member=None):
    """resources: what config.yaml grants a job of `rule` on that model (None: the one that its wildcards name); memory and
    time grow by half with every further attempt.

    Snakemake lowers `threads` to --cores; a job computes with cpus_per_task, so that its bytes do not depend on --cores.
    """
    granted = getattr(config.resources, rule)

    def growing(value):
        return lambda wildcards, attempt: -(-value * (attempt + 1) // 2)

    return {
        "cpus_per_task": granted.threads,
        "mem_mb": growing(granted.mem_mb),
        "runtime": growing(granted.runtime),
        "gpu": lambda wildcards: granted.gpus(
            member or wildcards.get("student") or wildcards.get("member")
        ),
    }


def checkpoint_files(member):
    """input: the checkpoint, unless it is a hub id, which is no file."""
    return [] if member in HUB else LAYOUT.checkpoint(member)


def features(member):
    """input: a word that the member's vision tower has seen all images, where features are kept on disk."""
    return f"{ROOT}/features/{member}.json" if config.evaluation.keep_features else []


def student_features(wildcards):
    """input: the same of the student's."""
    return features(wildcards.student)


def student_files(wildcards):
    """input: the checkpoint of the student as it is."""
    return checkpoint_files(wildcards.student)


def student_checkpoint(wildcards):
    """params: the same as a command takes it, hub ids included."""
    return LAYOUT.checkpoint(wildcards.student)


def images(folder):
    """input: a word that the images named by the questions in `folder` are there; rendered ones always are."""
    rendered = config.data.source == "rendered"
    return [] if rendered else f"{ROOT}/{folder}/images.checked"


def test_questions():
    """input: the question files of the test."""
    return [LAYOUT.questions("test", size) for size in TEST]


def first_runs(section):
    """input: the first seed's runs of the methods that a section of the configuration names."""
    return lambda wildcards: [
        run
        for method in LAYOUT.chosen(section, wildcards.student)
        for run in LAYOUT.runs(wildcards.student, method, 1)
    ]


def cells_of(suite, section):
    """input: the cells of a suite for every model under the methods that a section of the configuration names."""
    return [
        LAYOUT.cell(suite, member, method, size)
        for member in MEMBERS
        for method in LAYOUT.chosen(section, member)
        for size in SUITES[suite].sizes
    ]


def training_inputs(wildcards):
    """input: the training questions, and what the teacher said of them where a loss of the method needs it."""
    found = {"questions": LAYOUT.training_questions}
    if LAYOUT.hears_teacher(wildcards.method):
        found["cache"] = LAYOUT.teacher_cache
    if LAYOUT.validation:
        found["validation"] = LAYOUT.validation
    return found


def learned_from(input):
    """params: the flags of the teacher's cache and of the validation questions, where there are any."""
    cache = ["--teacher-cache", above(input.cache)] if "cache" in input.keys() else []
    asked = ["--validation", *LAYOUT.validation] if LAYOUT.validation else []
    return shlex.join([*cache, *asked])


def runs_behind(suite):
    """input: the training runs behind the cells of a suite."""
    return lambda wildcards: LAYOUT.runs(
        wildcards.student, wildcards.method, suite.seeds
    )


def ledger():
    """The ledger that comes with the workflow; one in the working folder, an edited copy, goes before it."""
    found = (Path(folder) / "claims.yaml" for folder in (".", workflow.basedir))
    return str(next(path for path in found if path.is_file()))


POPE = [suite for suite in SUITES if suite.startswith("pope_")]
POPE_CELLS = [cell for suite in POPE for cell in cells_of(suite, "pope")]
