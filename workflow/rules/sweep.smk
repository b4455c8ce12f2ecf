# Which part of LAid does what, outside of `rule all`:
#   snakemake --cores all sweep --configfile configs/sweep.yaml


localrules:
    sweep,


rule sweep:
    input:
        [
            LAYOUT.cell("validation", student, method, size)
            for student in config.sweep.students or STUDENTS
            for method in ["base", *config.sweep.against, *config.sweep.methods]
            for size in SUITES["validation"].sizes
        ],
    output:
        multiext(f"{ROOT}/sweep/sweep", ".csv", ".md"),
    log:
        f"{ROOT}/logs/sweep.log",
    conda:
        "../../envs/laid.yaml"
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("sweep"),
        cells=lambda wildcards, input: above(input[0], 4),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid sweep --config $CONFIG --cells {params.cells:q} --out {params.out:q} > {log:q} 2>&1"
