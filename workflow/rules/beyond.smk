# Beyond the paper, outside of `rule all`: `snakemake --cores all beyond`.


localrules:
    beyond,


FAR = config["beyond"]["sizes"]


rule beyond_haystacks:
    input:
        val=f"{COCO}/annotations/instances_val2017.json",
    output:
        expand(f"{ROOT}/beyond/haystacks/visual_haystack_{{size}}.json", size=FAR),
    log:
        f"{ROOT}/logs/beyond/haystacks.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("data", "threads")
    resources:
        cpus_per_task=ask("data", "threads"),
        mem_mb=ask("data", "mem_mb"),
        runtime=ask("data", "runtime"),
    params:
        relevant=relevant("beyond_haystacks"),
        coco=lambda wildcards, input: above(input.val, 2),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid haystacks --config $CONFIG --coco {params.coco} --beyond {params.out} 2>&1 | tee {log}"


rule beyond_evaluate:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.student),
        runs=runs_for,
        images=IMAGES,
        questions=expand(
            f"{ROOT}/beyond/haystacks/visual_haystack_{{size}}.json", size=FAR
        ),
    output:
        expand(
            f"{ROOT}/beyond/cells/{{{{student}}}}/{{{{method}}}}/{{size}}.json",
            size=FAR,
        ),
        f"{ROOT}/beyond/cells/{{student}}/{{method}}/cost.json",
    log:
        f"{ROOT}/logs/beyond/{{student}}-{{method}}.log",
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
        sizes=FAR,
    shell:
        "laid evaluate --config $CONFIG --student-name {wildcards.student} --method {wildcards.method}"
        " --model {params.model} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
        " --sizes {params.sizes} --out {params.out} --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule why:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.student),
        runs=first_runs("beyond"),
        images=IMAGES,
        questions=expand(
            f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json", size=SIZES
        ),
    output:
        f"{ROOT}/beyond/why/{{student}}.json",
    log:
        f"{ROOT}/logs/beyond/why-{{student}}.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("evaluate", "threads")
    resources:
        cpus_per_task=ask("evaluate", "threads"),
        mem_mb=ask("evaluate", "mem_mb"),
        runtime=ask("evaluate", "runtime"),
        gpu=ask("evaluate", "gpu"),
    params:
        relevant=relevant("why"),
        model=lambda wildcards: checkpoint(wildcards.student),
        methods=lambda wildcards: chosen("beyond", wildcards.student),
        coco=COCO,
        questions=lambda wildcards, input: above(input.questions[0]),
    shell:
        "laid why --config $CONFIG --student-name {wildcards.student} --model {params.model}"
        " --methods {params.methods} --runs {input.runs} --coco {params.coco} --questions {params.questions}"
        " --out {output} --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule beyond:
    input:
        why=[f"{ROOT}/beyond/why/{member}.json" for member in [TEACHER, *STUDENTS]],
        cells=[
            f"{ROOT}/beyond/cells/{member}/{method}/{size}.json"
            for member in [TEACHER, *STUDENTS]
            for method in chosen("beyond", member)
            for size in FAR
        ],
        near=[f"{ROOT}/cells/{cell}" for cell in CELLS],
    output:
        directory(f"{ROOT}/beyond/figures"),
        f"{ROOT}/beyond/why.md",
    log:
        f"{ROOT}/logs/beyond.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input.near[0], 3),
        out=lambda wildcards, output: above(output[1]),
    shell:
        "laid beyond --config $CONFIG --cells {params.cells} --out {params.out} > {log} 2>&1"
