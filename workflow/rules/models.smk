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
    threads: cores("pretrain")
    resources:
        **ask("pretrain"),
    params:
        relevant=relevant("pretrain"),
        coco=lambda wildcards, input: above(input.train, 2),
    shell:
        "laid pretrain --config $CONFIG --member {wildcards.member} --coco {params.coco:q} --out {output:q}"
        " --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"


# Where evaluation.keep_features says so: each tower sees each image once, and no other job waits for images.
rule features:
    input:
        model=lambda wildcards: checkpoint_files(wildcards.member),
        questions=[LAYOUT.training_questions, *LAYOUT.validation, *test_questions()],
        images=images("haystacks"),
    output:
        f"{ROOT}/features/{{member}}.json",
    log:
        f"{ROOT}/logs/features/{{member}}.log",
    priority: 85
    conda:
        "../../envs/laid.yaml"
    threads: cores("features")
    resources:
        **ask("features"),
    params:
        model=lambda wildcards: LAYOUT.checkpoint(wildcards.member),
        coco=COCO,
    shell:
        "laid features --config $CONFIG --model {params.model:q} --coco {params.coco:q}"
        " --questions {input.questions:q} --out {output:q} --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"


rule teacher_cache:
    input:
        teacher=checkpoint_files(TEACHER),
        features=features(TEACHER),
        questions=LAYOUT.training_questions,
        images=images("haystacks"),
    output:
        # Names every shard and its hash: as long as it stays the same, nothing that reads the cache runs again.
        index=LAYOUT.teacher_cache,
    log:
        f"{ROOT}/logs/teacher_cache.log",
    benchmark:
        f"{ROOT}/benchmarks/teacher_cache.tsv"
    priority: 80
    conda:
        "../../envs/laid.yaml"
    threads: cores("teacher_cache")
    resources:
        **ask("teacher_cache", TEACHER),
    params:
        relevant=relevant("teacher_cache"),
        teacher=lambda wildcards: LAYOUT.checkpoint(TEACHER),
        coco=COCO,
        out=lambda wildcards, output: above(output.index),
    shell:
        "laid teacher-cache --config $CONFIG --teacher {params.teacher:q} --coco {params.coco:q}"
        " --questions {input.questions:q} --out {params.out:q} --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"
