# What the jobs of this configuration would cost, before any of them runs; no part of `rule all`:
#   snakemake --cores 1 plan --configfile configs/paper.yaml


localrules:
    plan,


rule plan:
    output:
        multiext(f"{ROOT}/plan", ".md", ".json"),
    log:
        f"{ROOT}/logs/plan.log",
    conda:
        "../../envs/laid.yaml"
    threads: 1
    resources:
        mem_mb=2000,
        runtime=20,
    params:
        config=sha256_json(config.model_dump()),
        out=lambda wildcards, output: above(output[0]),
    # The table is printed and stays in the log even where `laid plan` refuses and Snakemake takes the files away.
    shell:
        "laid plan --config $CONFIG --out {params.out:q} 2>&1 | tee {log:q}"


# Every kind of job for a few steps on random weights, no part of `rule all` either:
#   snakemake --cores all rehearsal --configfile configs/paper.yaml
rule rehearsal:
    output:
        f"{ROOT}/rehearsal/rehearsal.json",
    log:
        f"{ROOT}/logs/rehearsal.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("train")
    resources:
        **ask("train"),
    params:
        config=sha256_json(config.model_dump()),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid rehearse --config $CONFIG --out {params.out:q} --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"
