# Looking into the models: attention heads for Figure 4 and the spectra, and what an exported student costs.


ANALYSES = [f"{ROOT}/analysis/{member}.json" for member in [TEACHER, *STUDENTS]]
COSTS = [
    f"{ROOT}/inference_cost/{student}.json"
    for student in STUDENTS
    if "laid" in chosen("analysis", student)
]


rule analysis:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.student),
        runs=first_runs("analysis"),
        images=IMAGES,
        questions=expand(
            f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json", size=SIZES
        ),
    output:
        f"{ROOT}/analysis/{{student}}.json",
    log:
        f"{ROOT}/logs/analysis/{{student}}.log",
    # No table waits for it.
    priority: 10
    conda:
        "../../envs/laid.yaml"
    threads: ask("evaluate", "threads")
    resources:
        cpus_per_task=ask("evaluate", "threads"),
        mem_mb=ask("evaluate", "mem_mb"),
        runtime=ask("evaluate", "runtime"),
        gpu=ask("evaluate", "gpu"),
    params:
        relevant=relevant("analyse"),
        model=lambda wildcards: checkpoint(wildcards.student),
        methods=lambda wildcards: chosen("analysis", wildcards.student),
        coco=COCO,
        questions=lambda wildcards, input: above(input.questions[0]),
    shell:
        "laid analyse --config $CONFIG --student-name {wildcards.student} --model {params.model}"
        " --methods {params.methods} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
        " --out {output} --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule inference_cost:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.student),
        run=f"{ROOT}/runs/{{student}}/laid/seed0",
        images=IMAGES,
        questions=expand(
            f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json", size=SIZES
        ),
    output:
        f"{ROOT}/inference_cost/{{student}}.json",
    log:
        f"{ROOT}/logs/inference_cost/{{student}}.log",
    priority: 5
    conda:
        "../../envs/laid.yaml"
    threads: ask("evaluate", "threads")
    resources:
        cpus_per_task=ask("evaluate", "threads"),
        mem_mb=ask("evaluate", "mem_mb"),
        runtime=ask("evaluate", "runtime"),
        gpu=ask("evaluate", "gpu"),
    params:
        model=lambda wildcards: checkpoint(wildcards.student),
        coco=COCO,
        questions=lambda wildcards, input: above(input.questions[0]),
        sizes=sorted({SIZES[len(SIZES) // 2], SIZES[-1]}),
    shell:
        "python $BENCH/inference_cost.py --config $CONFIG --student-name {wildcards.student} --model {params.model}"
        " --run {input.run} --coco {params.coco} --questions {params.questions} --sizes {params.sizes}"
        " --out {output} --threads {resources.cpus_per_task} 2>&1 | tee {log}"
