# Why windows shrink, outside of `rule all`: `snakemake --cores all beyond`.


localrules:
    beyond,


rule beyond:
    input:
        far=cells_of("beyond", "beyond"),
        near=CELLS,
        why=[f"{ROOT}/beyond/why/{member}.json" for member in MEMBERS],
    output:
        directory(f"{ROOT}/beyond/figures"),
        f"{ROOT}/beyond/why.md",
    log:
        f"{ROOT}/logs/beyond.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input.near[0], 4),
        out=lambda wildcards, output: above(output[1]),
    shell:
        "laid beyond --config $CONFIG --cells {params.cells:q} --out {params.out:q} > {log:q} 2>&1"
