# Cells: one JSON file per suite, student, method and size, with every answer in it.


# Loading Python, torch and the model costs more than a small model's answers, so at small scale one job measures all
# sizes of a suite for a student and method; `evaluation: {shard: cell}` makes one job per size, for large models and
# many GPUs. A suite's sizes are its own, so its rule is: evaluate_test, evaluate_validation ...
for suite in SUITES.values():
    sizes = suite.sizes if config.evaluation.shard == "model" else ["{size}"]
    one = "" if config.evaluation.shard == "model" else "{size}."

    rule:
        name:
            f"evaluate_{suite.name}"
        input:
            model=student_files,
            features=student_features,
            runs=runs_behind(suite),
            images=images(suite.folder),
            questions=[LAYOUT.questions(suite.name, size) for size in sizes],
        output:
            [LAYOUT.cell(suite.name, "{student}", "{method}", size) for size in sizes],
            cost=f"{ROOT}/cells/{suite.name}/{{student}}/{{method}}/{one}cost.json",
        log:
            f"{ROOT}/logs/evaluate/{suite.name}/{{student}}-{{method}}.{one}log",
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
            out=lambda wildcards, output: above(output[0]),
        shell:
            "laid evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
            " --model {params.model:q} --runs {input.runs:q} --coco {params.coco:q} --questions {input.questions:q}"
            " --out {params.out:q} --cost {output.cost:q} --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"
