# What all rules share: the validated configuration, the folder of results, and which cells the tables need.
from pathlib import Path

from snakemake.exceptions import WorkflowError

from laid.settings import TrainedMethod, load, resolved_file, slice_json
from laid.errors import LaidError
from laid.io import sha256_json
from laid.results.needed import needed

try:
    # Read again as laid reads YAML, config.yaml first: a message then says where a value stands.
    overlays = workflow.overwrite_configfiles
    base = [file for file in workflow.configfiles if file not in overlays]
    config = load([*base, *overlays], workflow.config_settings.config)
    CELLS = [
        f"{student}/{method}/{size}.json" for student, method, size in needed(config)
    ]
except LaidError as error:
    raise WorkflowError(str(error)) from None

# Every job reads the resolved configuration, `--config` and all, from a file named by its content. It is no input of
# any rule: what makes a rule run again is the slice of values in its params.
# Where the checkout lies is no param either: in a clone elsewhere nothing needs to run again.
shell.prefix(
    f"set -euo pipefail; CONFIG={resolved_file(config, '.snakemake/laid')}; BENCH={workflow.basedir}/bench; "
)

ROOT = f"{config['results']}/{config['scale']}"
COCO = config["data"]["root"] if config["data"]["source"] == "local" else f"{ROOT}/coco"
# Beside the questions whose images it vouches for: new questions take it away with the old ones.
CHECKED = f"{ROOT}/haystacks/images.checked"
IMAGES = [] if config["data"]["source"] == "rendered" else CHECKED
TEACHER, STUDENTS = config["models"]["teacher"], config["models"]["students"]
SIZES = sorted(config["haystacks"]["test"]["sizes"])
# The ledger that comes with the workflow; one in the working folder, an edited copy, goes before it.
LEDGER = next(
    p for p in ("claims.yaml", f"{workflow.basedir}/claims.yaml") if Path(p).is_file()
)
TRAINED = [
    name for name, method in config.methods.items() if isinstance(method, TrainedMethod)
]
ABLATED = [method for method in TRAINED if method.startswith("laid")]


wildcard_constraints:
    member="|".join([TEACHER, *STUDENTS]),
    student="|".join([TEACHER, *STUDENTS]),
    trained="|".join(TRAINED),
    method="[a-z_]+",
    seed=r"\d+",
    size=r"\d+",


def relevant(step):
    """params: the values that the result of `step` depends on; another value there, and the job runs again."""
    return lambda wildcards: slice_json(step, config, **dict(wildcards))


def above(path, levels=1):
    """The folder `levels` above a file."""
    return str(Path(path).parents[levels - 1])


def checkpoint(member):
    """Where a member's checkpoint is: a folder made here, a folder of the user's, or a hub id."""
    return config["models"]["checkpoints"].get(member, f"{ROOT}/models/{member}")


def checkpoint_files(member):
    """input: the checkpoint, unless it is a hub id, which is no file."""
    given = config["models"]["checkpoints"].get(member)
    return [] if given and not Path(given).exists() else checkpoint(member)


def long(method):
    """Whether a method learns from the long haystacks, without labels."""
    return config["methods"][method].get("questions") == "long"


LONG = f"{ROOT}/haystacks/long.json"
# The long haystacks, where a table asks for a method that learns from them.
LONG_ASKED = [LONG] if any(long(cell.split("/")[1]) for cell in CELLS) else []


def questions_for(wildcards):
    """The questions a method learns from."""
    return LONG if long(wildcards.trained) else f"{ROOT}/haystacks/train.json"


def teacher_cache_for(wildcards):
    """Where a teacher's loss has weight, what the teacher said of the same questions."""
    method = config["methods"][wildcards.trained]
    if not any(method[f"lambda_{part}"] for part in ("kl", "laid", "rows")):
        return []
    folder = "teacher_cache_long" if long(wildcards.trained) else "teacher_cache"
    return f"{ROOT}/{folder}/index.json"


def runs_of(student, method, seeds):
    """The training runs of a method, one per seed; none for base, YaRN and SelfExtend."""
    seeds = range(seeds) if method in TRAINED else []
    return [f"{ROOT}/runs/{student}/{method}/seed{seed}" for seed in seeds]


def runs_for(wildcards):
    """The training runs behind a cell."""
    return runs_of(wildcards.student, wildcards.method, config["seeds"])


def sweep_runs(wildcards):
    """The training runs behind a cell of the sweep; runs of the tables' own methods serve as well."""
    return runs_of(wildcards.student, wildcards.method, config["sweep"]["seeds"])


def chosen(section, student):
    """The methods that a section of the configuration names, those that the student's tables have."""
    own = {Path(cell).parts[1] for cell in CELLS if Path(cell).parts[0] == student}
    return [method for method in config[section]["methods"] if method in own]


def first_runs(section):
    """input: the first seed's runs of the methods that a section of the configuration names."""
    return lambda wildcards: [
        run
        for method in chosen(section, wildcards.student)
        for run in runs_of(wildcards.student, method, 1)
    ]


def ask(rule, key):
    """resources: what config.yaml grants a job of `rule`; memory and time grow by half with every further attempt."""
    value = config["resources"][rule][key]
    if key in ("mem_mb", "runtime"):
        return lambda wildcards, attempt: -(-value * (attempt + 1) // 2)
    return value
