# The family: one teacher and its students, each a folder in Hugging Face format.


rule pretrain:
    input:
        train=f"{COCO}/annotations/instances_train2017.json",
    output:
        directory(f"{ROOT}/models/{{member}}"),
    log:
        f"{ROOT}/logs/pretrain/{{member}}.log",
    benchmark:
        f"{ROOT}/benchmarks/pretrain/{{member}}.tsv"
    # The teacher is the longest single job, and everything that distils waits for it.
    priority: 90
    conda:
        "../../envs/laid.yaml"
    threads: ask("pretrain", "threads")
    resources:
        cpus_per_task=ask("pretrain", "threads"),
        mem_mb=ask("pretrain", "mem_mb"),
        runtime=ask("pretrain", "runtime"),
        gpu=ask("pretrain", "gpu"),
    params:
        relevant=relevant("pretrain"),
        coco=lambda wildcards, input: above(input.train, 2),
    shell:
        "laid pretrain --config $CONFIG --member {wildcards.member} --coco {params.coco} --out {output}"
        " --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule teacher_cache:
    input:
        teacher=checkpoint_files(TEACHER),
        questions=f"{ROOT}/haystacks/train.json",
        images=IMAGES,
    output:
        # Names every shard and its hash: as long as it stays the same, nothing that reads the cache runs again.
        index=f"{ROOT}/teacher_cache/index.json",
    log:
        f"{ROOT}/logs/teacher_cache.log",
    benchmark:
        f"{ROOT}/benchmarks/teacher_cache.tsv"
    priority: 80
    conda:
        "../../envs/laid.yaml"
    threads: ask("teacher_cache", "threads")
    resources:
        cpus_per_task=ask("teacher_cache", "threads"),
        mem_mb=ask("teacher_cache", "mem_mb"),
        runtime=ask("teacher_cache", "runtime"),
        gpu=ask("teacher_cache", "gpu"),
    params:
        relevant=relevant("teacher_cache"),
        teacher=lambda wildcards: checkpoint(TEACHER),
        coco=COCO,
        out=lambda wildcards, output: above(output.index),
    shell:
        "laid teacher-cache --config $CONFIG --teacher {params.teacher} --coco {params.coco}"
        " --questions {input.questions} --out {params.out} --threads {resources.cpus_per_task} 2>&1 | tee {log}"


rule teacher_cache_long:
    input:
        teacher=checkpoint_files(TEACHER),
        questions=LONG,
        images=IMAGES,
    output:
        index=f"{ROOT}/teacher_cache_long/index.json",
    log:
        f"{ROOT}/logs/teacher_cache_long.log",
    benchmark:
        f"{ROOT}/benchmarks/teacher_cache_long.tsv"
    priority: 80
    conda:
        "../../envs/laid.yaml"
    threads: ask("teacher_cache", "threads")
    resources:
        cpus_per_task=ask("teacher_cache", "threads"),
        mem_mb=ask("teacher_cache", "mem_mb"),
        runtime=ask("teacher_cache", "runtime"),
        gpu=ask("teacher_cache", "gpu"),
    params:
        relevant=relevant("teacher_cache"),
        teacher=lambda wildcards: checkpoint(TEACHER),
        coco=COCO,
        out=lambda wildcards, output: above(output.index),
    shell:
        "laid teacher-cache --config $CONFIG --teacher {params.teacher} --coco {params.coco} --without-labels"
        " --questions {input.questions} --out {params.out} --threads {resources.cpus_per_task} 2>&1 | tee {log}"
