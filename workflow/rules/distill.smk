# Post-training of the students: SFT, KD, LAid and its ablations, one job per student, method and seed.


rule train:
    input:
        student=lambda wildcards: checkpoint_files(wildcards.student),
        questions=questions_for,
        images=IMAGES,
        cache=teacher_cache_for,
    output:
        directory(f"{ROOT}/runs/{{student}}/{{trained}}/seed{{seed}}"),
    log:
        f"{ROOT}/logs/train/{{student}}-{{trained}}-seed{{seed}}.log",
    benchmark:
        f"{ROOT}/benchmarks/train/{{student}}-{{trained}}-seed{{seed}}.tsv"
    # What needs no teacher fills the cores while the teacher is being made.
    priority: 70
    conda:
        "../../envs/laid.yaml"
    threads: ask("train", "threads")
    resources:
        cpus_per_task=ask("train", "threads"),
        mem_mb=ask("train", "mem_mb"),
        runtime=ask("train", "runtime"),
        gpu=ask("train", "gpu"),
    params:
        relevant=lambda wc: relevant("train")(dict(wc) | {"method": wc.trained}),
        student=lambda wildcards: checkpoint(wildcards.student),
        coco=COCO,
        cache=lambda wildcards, input: (
            f"--teacher-cache {above(input.cache)}" if input.cache else ""
        ),
    shell:
        "laid train --config $CONFIG --method {wildcards.trained} --seed {wildcards.seed}"
        " --student-name {wildcards.student} --student {params.student} {params.cache}"
        " --coco {params.coco} --questions {input.questions} --out {output} --processes {resources.gpu}"
        " --threads {resources.cpus_per_task} 2>&1 | tee {log}"
