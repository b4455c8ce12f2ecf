# Which part of LAid does what, outside of `rule all`:
#   snakemake --cores all sweep --configfile configs/sweep.yaml


localrules:
    sweep,


SWEPT = [*config.sweep.against, *config.sweep.methods]
VALIDATION = sorted(config["haystacks"]["validation"]["sizes"])


rule sweep_evaluate:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.student),
        runs=sweep_runs,
        images=IMAGES,
        questions=expand(
            f"{ROOT}/haystacks/validation/visual_haystack_{{size}}.json",
            size=VALIDATION,
        ),
    output:
        expand(
            f"{ROOT}/sweep/cells/{{{{student}}}}/{{{{method}}}}/{{size}}.json",
            size=VALIDATION,
        ),
        f"{ROOT}/sweep/cells/{{student}}/{{method}}/cost.json",
    log:
        f"{ROOT}/logs/sweep/{{student}}-{{method}}.log",
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
        sizes=VALIDATION,
    shell:
        "laid evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
        " --model {params.model} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
        " --sizes {params.sizes} --out {params.out} --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule sweep:
    input:
        [
            f"{ROOT}/sweep/cells/{student}/{method}/{size}.json"
            for student in config["sweep"]["students"] or STUDENTS
            for method in ["base", *SWEPT]
            for size in VALIDATION
        ],
    output:
        multiext(f"{ROOT}/sweep/sweep", ".csv", ".md"),
    log:
        f"{ROOT}/logs/sweep.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("sweep"),
        cells=lambda wildcards, input: above(input[0], 3),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid sweep --config $CONFIG --cells {params.cells} --out {params.out} > {log} 2>&1"
