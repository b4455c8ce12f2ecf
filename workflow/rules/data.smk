# COCO data and the haystacks built from them.

if config["data"]["source"] != "local":

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
        threads: ask("data", "threads")
        resources:
            cpus_per_task=ask("data", "threads"),
            mem_mb=ask("data", "mem_mb"),
            runtime=ask("data", "runtime"),
        params:
            relevant=relevant("data"),
            out=lambda wildcards, output: above(output.train, 2),
        shell:
            "laid data --config $CONFIG --out {params.out} 2>&1 | tee {log}"


rule haystacks:
    input:
        train=f"{COCO}/annotations/instances_train2017.json",
        val=f"{COCO}/annotations/instances_val2017.json",
    output:
        train=f"{ROOT}/haystacks/train.json",
        test=expand(f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json", size=SIZES),
        validation=expand(
            f"{ROOT}/haystacks/validation/visual_haystack_{{size}}.json",
            size=config["haystacks"]["validation"]["sizes"],
        ),
        shortcuts=multiext(f"{ROOT}/haystacks/shortcuts", ".json", ".md"),
    log:
        f"{ROOT}/logs/haystacks.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("data", "threads")
    resources:
        cpus_per_task=ask("data", "threads"),
        mem_mb=ask("data", "mem_mb"),
        runtime=ask("data", "runtime"),
    params:
        relevant=relevant("haystacks"),
        coco=lambda wildcards, input: above(input.train, 2),
        out=lambda wildcards, output: above(output.train),
    shell:
        "laid haystacks --config $CONFIG --coco {params.coco} --out {params.out} 2>&1 | tee {log}"


rule haystacks_long:
    input:
        train=f"{COCO}/annotations/instances_train2017.json",
        # Built second: `laid haystacks` replaces the folder.
        first=f"{ROOT}/haystacks/train.json",
    output:
        LONG,
    log:
        f"{ROOT}/logs/haystacks_long.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("data", "threads")
    resources:
        cpus_per_task=ask("data", "threads"),
        mem_mb=ask("data", "mem_mb"),
        runtime=ask("data", "runtime"),
    params:
        relevant=relevant("haystacks_long"),
        coco=lambda wildcards, input: above(input.train, 2),
    shell:
        "laid haystacks --config $CONFIG --coco {params.coco} --long {output} 2>&1 | tee {log}"


# Rendered images are all there. Downloaded ones are fetched, a user's own ones looked at, once the questions name them.
if config["data"]["source"] != "rendered":

    rule images:
        input:
            train=f"{ROOT}/haystacks/train.json",
            test=expand(
                f"{ROOT}/haystacks/test/visual_haystack_{{size}}.json", size=SIZES
            ),
            validation=expand(
                f"{ROOT}/haystacks/validation/visual_haystack_{{size}}.json",
                size=config["haystacks"]["validation"]["sizes"],
            ),
            long=LONG_ASKED,
        output:
            touch(CHECKED),
        log:
            f"{ROOT}/logs/images.log",
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
            "laid data --config $CONFIG --out {params.coco}"
            " --questions {input.train} {input.validation} {input.test} {input.long} 2>&1 | tee {log}"
