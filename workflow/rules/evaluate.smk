# Cells: one JSON file per student, method and size, with every answer in it.


# Loading Python, torch and the model costs more than a small model's answers, so at small scale one job measures all
# sizes of a student and method; `evaluation: shard: cell` makes one job per size, for large models and many GPUs.
if config["evaluation"]["shard"] == "model":

    rule evaluate:
        input:
            model=lambda wildcards: checkpoint_files(wildcards.student),
            runs=runs_for,
            images=IMAGES,
            questions=expand(
                f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json", size=SIZES
            ),
        output:
            expand(
                f"{ROOT}/cells/{{{{student}}}}/{{{{method}}}}/{{size}}.json",
                size=SIZES,
            ),
            f"{ROOT}/cells/{{student}}/{{method}}/cost.json",
        log:
            f"{ROOT}/logs/evaluate/{{student}}-{{method}}.log",
        priority: 60
        conda:
            "../../envs/laid.yaml"
        threads: ask("evaluate", "threads")
        resources:
            cpus_per_task=ask("evaluate", "threads"),
            mem_mb=ask("evaluate", "mem_mb"),
            runtime=ask("evaluate", "runtime"),
            gpu=ask("evaluate", "gpu"),
        params:
            relevant=relevant("evaluate"),
            model=lambda wildcards: checkpoint(wildcards.student),
            coco=COCO,
            questions=lambda wildcards, input: above(input.questions[0]),
            out=lambda wildcards, output: above(output[0]),
            sizes=SIZES,
        shell:
            "laid evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
            " --model {params.model} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
            " --sizes {params.sizes} --out {params.out} --threads {resources.cpus_per_task} 2>&1 | tee {log}"

else:

    rule evaluate:
        input:
            model=lambda wildcards: checkpoint_files(wildcards.student),
            runs=runs_for,
            images=IMAGES,
            questions=f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json",
        output:
            f"{ROOT}/cells/{{student}}/{{method}}/{{size}}.json",
            f"{ROOT}/cells/{{student}}/{{method}}/{{size}}.cost.json",
        log:
            f"{ROOT}/logs/evaluate/{{student}}-{{method}}-{{size}}.log",
        conda:
            "../../envs/laid.yaml"
        threads: ask("evaluate", "threads")
        resources:
            cpus_per_task=ask("evaluate", "threads"),
            mem_mb=ask("evaluate", "mem_mb"),
            runtime=ask("evaluate", "runtime"),
            gpu=ask("evaluate", "gpu"),
        params:
            relevant=relevant("evaluate"),
            model=lambda wildcards: checkpoint(wildcards.student),
            coco=COCO,
            questions=lambda wildcards, input: above(input.questions),
            out=lambda wildcards, output: above(output[0]),
        shell:
            "laid evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
            " --model {params.model} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
            " --sizes {wildcards.size} --out {params.out} --cost {wildcards.size}.cost.json --threads {resources.cpus_per_task} 2>&1 | tee {log}"
