# COCO data and the questions built from them.

if config.data.source != "local":

    rule data:
        output:
            train=f"{COCO}/annotations/instances_train2017.json",
            val=f"{COCO}/annotations/instances_val2017.json",
        log:
            f"{ROOT}/logs/data.log",
        benchmark:
            f"{ROOT}/benchmarks/data.tsv"
        priority: 100
        conda:
            "../../envs/laid.yaml"
        threads: cores("data")
        resources:
            **ask("data"),
        params:
            relevant=relevant("data"),
            out=lambda wildcards, output: above(output.train, 2),
        shell:
            "laid data --config $CONFIG --out {params.out:q} 2>&1 | tee {log:q}"


rule haystacks:
    input:
        train=f"{COCO}/annotations/instances_train2017.json",
        val=f"{COCO}/annotations/instances_val2017.json",
    output:
        train=LAYOUT.training_questions,
        test=test_questions(),
        validation=[
            LAYOUT.questions("validation", size) for size in SUITES["validation"].sizes
        ],
        shortcuts=multiext(f"{ROOT}/haystacks/shortcuts", ".json", ".md"),
    log:
        f"{ROOT}/logs/haystacks.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("data")
    resources:
        **ask("data"),
    params:
        relevant=relevant("haystacks"),
        coco=lambda wildcards, input: above(input.train, 2),
        kind="--out",
        out=lambda wildcards, output: above(output.train),
    shell:
        "laid haystacks --config $CONFIG --coco {params.coco:q} {params.kind} {params.out:q} 2>&1 | tee {log:q}"


use rule haystacks as haystacks_beyond with:
    input:
        val=f"{COCO}/annotations/instances_val2017.json",
    output:
        [LAYOUT.questions("beyond", size) for size in SUITES["beyond"].sizes],
    log:
        f"{ROOT}/logs/beyond/haystacks.log",
    params:
        relevant=relevant("beyond_haystacks"),
        coco=lambda wildcards, input: above(input.val, 2),
        kind="--beyond",
        out=lambda wildcards, output: above(output[0]),


rule pope_questions:
    input:
        val=f"{COCO}/annotations/instances_val2017.json",
    output:
        [LAYOUT.questions(suite, 1) for suite in POPE],
    log:
        f"{ROOT}/logs/pope/questions.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("data")
    resources:
        **ask("data"),
    params:
        relevant=relevant("pope"),
        coco=lambda wildcards, input: above(input.val, 2),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid pope questions --config $CONFIG --coco {params.coco:q} --out {params.out:q} 2>&1 | tee {log:q}"


# Rendered images are all there. Downloaded ones are fetched, a user's own ones looked at, once the questions name them.
# The mark lies beside the questions: new questions take it away with the old ones.
rule images:
    input:
        lambda wildcards: LAYOUT.question_files(wildcards.asked),
    output:
        touch(f"{ROOT}/{{asked}}/images.checked"),
    log:
        f"{ROOT}/logs/images-{{asked}}.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("data")
    resources:
        **ask("data"),
    params:
        coco=f"{ROOT}/coco",
    shell:
        "laid data --config $CONFIG --out {params.coco:q} --questions {input:q} 2>&1 | tee {log:q}"
