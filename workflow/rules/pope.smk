# Object questions about single images (POPE), outside of `rule all`: `snakemake --cores all pope`.


localrules:
    pope,


STRATEGIES = ["random", "popular", "adversarial"]


rule pope_questions:
    input:
        val=f"{COCO}/annotations/instances_val2017.json",
    output:
        [f"{ROOT}/pope/questions/coco_pope_{strategy}.json" for strategy in STRATEGIES],
    log:
        f"{ROOT}/logs/pope/questions.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("data", "threads")
    resources:
        cpus_per_task=ask("data", "threads"),
        mem_mb=ask("data", "mem_mb"),
        runtime=ask("data", "runtime"),
    params:
        relevant=relevant("pope"),
        coco=lambda wildcards, input: above(input.val, 2),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid pope questions --config $CONFIG --coco {params.coco} --out {params.out} 2>&1 | tee {log}"


# As for the haystacks: only now is it known which images are needed.
if config["data"]["source"] != "rendered":

    rule pope_images:
        input:
            rules.pope_questions.output,
        output:
            touch(f"{ROOT}/pope/images.checked"),
        log:
            f"{ROOT}/logs/pope/images.log",
        conda:
            "../../envs/laid.yaml"
        threads: ask("data", "threads")
        resources:
            cpus_per_task=ask("data", "threads"),
            mem_mb=ask("data", "mem_mb"),
            runtime=ask("data", "runtime"),
        params:
            coco=f"{ROOT}/coco",
        shell:
            "laid data --config $CONFIG --out {params.coco} --questions {input} 2>&1 | tee {log}"


rule pope_evaluate:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.student),
        runs=runs_for,
        questions=rules.pope_questions.output,
        images=(
            [] if config["data"]["source"] == "rendered" else rules.pope_images.output
        ),
    output:
        [
            f"{ROOT}/pope/cells/{strategy}/{{student}}/{{method}}/1.json"
            for strategy in STRATEGIES
        ],
    log:
        f"{ROOT}/logs/pope/{{student}}-{{method}}.log",
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
        out=lambda wildcards, output: above(output[0], 4),
    shell:
        "laid pope evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
        " --model {params.model} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
        " --out {params.out} --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule pope:
    input:
        [
            f"{ROOT}/pope/cells/{strategy}/{member}/{method}/1.json"
            for member in [TEACHER, *STUDENTS]
            for method in chosen("pope", member)
            for strategy in STRATEGIES
        ],
    output:
        multiext(f"{ROOT}/pope/pope", ".csv", ".md"),
    log:
        f"{ROOT}/logs/pope.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 4),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid pope table --config $CONFIG --cells {params.cells} --out {params.out} > {log} 2>&1"
