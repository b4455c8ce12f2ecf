# Cells: one JSON file per suite, student, method and size, with every answer in it.


# Loading Python, torch and the model costs more than a small model's answers, so at small scale one job measures all
# sizes for a student and method, of suites that go together too; `evaluation: {shard: cell}` makes one job per size, for
# large models and many GPUs. Each has its rule: evaluate_test, evaluate_validation ...
BY_MODEL = config.evaluation.shard == "model"
ASKED = {name: [suite] for name, suite in SUITES.items()}
if BY_MODEL:
    ASKED = {name: suites for name, suites in ASKED.items() if name not in POPE}
    ASKED["pope"] = [SUITES[name] for name in POPE]
    if config.beyond.table:
        ASKED["rows"] = [SUITES["test"], SUITES["beyond"]]
# Table 1 has rows of them.
ROWS = ["base", *config.tables.methods]


def sizes_of(suite):
    """input, output: the sizes that a job asks."""
    return suite.sizes if BY_MODEL else ["{size}"]


def words_of(suites):
    """params: the flags of each suite's question files and of the folder of its cells."""
    found = []
    for suite in suites:
        folder = f"{ROOT}/cells/{suite.name}/{{student}}/{{method}}"
        files = [LAYOUT.questions(suite.name, size) for size in sizes_of(suite)]
        found += ["--questions", *files, "--out", folder]
        found += [] if BY_MODEL else ["--cost", f"{folder}/{{size}}.cost.json"]
    return shlex.join(found)


for name, suites in ASKED.items():

    rule:
        name:
            f"evaluate_{name}"
        input:
            model=student_files,
            features=student_features,
            runs=runs_behind(suites[0]),
            images=[
                images(folder) for folder in dict.fromkeys(s.folder for s in suites)
            ],
            questions=[
                LAYOUT.questions(suite.name, size)
                for suite in suites
                for size in sizes_of(suite)
            ],
        output:
            [
                LAYOUT.cell(suite.name, "{student}", "{method}", size)
                for suite in suites
                for size in sizes_of(suite)
            ],
            [
                LAYOUT.cell(
                    suite.name,
                    "{student}",
                    "{method}",
                    "cost" if BY_MODEL else "{size}.cost",
                )
                for suite in suites
            ],
        log:
            f"{ROOT}/logs/evaluate/{name}/{{student}}-{{method}}.{'' if BY_MODEL else '{size}.'}log",
        wildcard_constraints:
            method="|".join(ROWS if name == "rows" else config.methods),
        priority: 60
        conda:
            "../../envs/laid.yaml"
        threads: cores("evaluate")
        resources:
            **ask("evaluate"),
        params:
            relevant=relevant("evaluate"),
            model=student_checkpoint,
            coco=COCO,
            asked=words_of(suites),
        shell:
            "laid evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
            " --model {params.model:q} --runs {input.runs:q} --coco {params.coco:q} {params.asked}"
            " --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"


if "rows" in ASKED:

    ruleorder: evaluate_rows > evaluate_test
    ruleorder: evaluate_rows > evaluate_beyond
