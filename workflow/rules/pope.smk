# The table of POPE's object questions about single images: `snakemake --cores all pope`.


localrules:
    pope,


rule pope:
    input:
        POPE_CELLS,
    output:
        multiext(f"{ROOT}/pope/pope", ".csv", ".md"),
    log:
        f"{ROOT}/logs/pope.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 4),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid pope table --config $CONFIG --cells {params.cells:q} --out {params.out:q} > {log:q} 2>&1"
