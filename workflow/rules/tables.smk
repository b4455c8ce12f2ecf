# Tables 1, 2 and 3, built from cells only.


localrules:
    tables,


rule tables:
    input:
        [f"{ROOT}/cells/{cell}" for cell in CELLS],
    output:
        expand(
            f"{ROOT}/tables/table{{number}}.{{suffix}}",
            number=[1, 2, 3],
            suffix=["csv", "md"],
        ),
    log:
        f"{ROOT}/logs/tables.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 3),
        out=lambda wildcards, output: above(output[0]),
    shell:
        "laid tables --config $CONFIG --cells {params.cells} --out {params.out} > {log} 2>&1"
