# Looking into the models: attention heads for Figure 4 and the spectra, what equation 7 can reach, why windows end, what an
# exported student costs.

ANALYSES = [f"{ROOT}/analysis/{member}.json" for member in MEMBERS]
ALIGNABILITY = [f"{ROOT}/alignability/{student}.json" for student in LAYOUT.aligned()]
COSTS = [
    f"{ROOT}/inference_cost/{student}/{method}.json"
    for student in STUDENTS
    for method in LAYOUT.chosen("analysis", student)
    if method in LAID
]


rule analysis:
    input:
        model=student_files,
        runs=first_runs("analysis"),
        images=images("haystacks"),
        questions=test_questions(),
    output:
        f"{ROOT}/analysis/{{student}}.json",
    log:
        f"{ROOT}/logs/analysis/{{student}}.log",
    # No table waits for it.
    priority: 10
    conda:
        "../../envs/laid.yaml"
    threads: cores("evaluate")
    resources:
        **ask("evaluate"),
    params:
        relevant=relevant("analyse"),
        verb="analyse",
        model=student_checkpoint,
        methods=lambda wildcards: LAYOUT.chosen("analysis", wildcards.student),
        coco=COCO,
        questions=lambda wildcards, input: above(input.questions[0]),
    shell:
        "laid {params.verb:q} --config $CONFIG --student-name {wildcards.student} --model {params.model:q}"
        " --methods {params.methods:q} --runs {input.runs:q} --coco {params.coco:q} --questions {params.questions:q}"
        " --out {output:q} --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"


use rule analysis as why with:
    input:
        model=student_files,
        runs=first_runs("beyond"),
        images=images("haystacks"),
        questions=test_questions(),
    output:
        f"{ROOT}/beyond/why/{{student}}.json",
    log:
        f"{ROOT}/logs/beyond/why-{{student}}.log",
    params:
        relevant=relevant("why"),
        verb="why",
        model=student_checkpoint,
        methods=lambda wildcards: LAYOUT.chosen("beyond", wildcards.student),
        coco=COCO,
        questions=lambda wildcards, input: above(input.questions[0]),


rule alignability:
    input:
        teacher=checkpoint_files(TEACHER),
        student=student_files,
        images=images("haystacks"),
        questions=LAYOUT.training_questions,
    output:
        f"{ROOT}/alignability/{{student}}.json",
        multiext(f"{ROOT}/alignability/{{student}}", ".md", ".csv", ".svg", ".png"),
    log:
        f"{ROOT}/logs/alignability/{{student}}.log",
    # Before the trainings: it tells whether their loss has a target.
    priority: 75
    conda:
        "../../envs/laid.yaml"
    threads: cores("evaluate")
    resources:
        **ask("evaluate", TEACHER),
    params:
        relevant=relevant("alignability"),
        teacher=lambda wildcards: LAYOUT.checkpoint(TEACHER),
        student=student_checkpoint,
        coco=COCO,
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid alignability --config $CONFIG --teacher {params.teacher:q} --student {params.student:q}"
        " --student-name {wildcards.student} --coco {params.coco:q} --questions {input.questions:q} --out {params.out:q}"
        " --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"


rule inference_cost:
    input:
        model=student_files,
        run=LAYOUT.run("{student}", "{method}", 0),
        images=images("haystacks"),
        questions=test_questions(),
    output:
        f"{ROOT}/inference_cost/{{student}}/{{method}}.json",
    log:
        f"{ROOT}/logs/inference_cost/{{student}}-{{method}}.log",
    priority: 5
    conda:
        "../../envs/laid.yaml"
    threads: cores("evaluate")
    resources:
        **ask("evaluate"),
    params:
        model=student_checkpoint,
        coco=COCO,
        questions=lambda wildcards, input: above(input.questions[0]),
        sizes=sorted({TEST[len(TEST) // 2], TEST[-1]}),
    shell:
        'python "$BENCH"/inference_cost.py --config $CONFIG --student-name {wildcards.student} --model {params.model:q}'
        " --method {wildcards.method} --run {input.run:q} --coco {params.coco:q} --questions {params.questions:q} --sizes {params.sizes:q}"
        " --out {output:q} --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"
