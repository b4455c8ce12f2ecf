# Learning rate, epochs, and adapter or all weights of every method, outside of `rule all`:
#   snakemake --cores all tune --configfile configs/tune.yaml


localrules:
    tune,


rule tune:
    input:
        LAYOUT.needed_by_tune(),
    output:
        multiext(f"{ROOT}/tune/tune", ".csv", ".md"),
    log:
        f"{ROOT}/logs/tune.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("tune"),
        cells=lambda wildcards, input: above(input[0], 4),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid tune --config $CONFIG --cells {params.cells:q} --out {params.out:q} 2>&1 | tee {log:q}"
