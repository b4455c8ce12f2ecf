# Tables 1, 2 and 3 (and Table 1 beyond the paper's sizes) with paired tests and effective windows, built from cells only.


localrules:
    tables,


TABLES = [
    "table1",
    *(["table1_beyond"] if config.beyond.table else []),
    "table2",
    "table3",
    "tests",
    "windows",
    "window_ratios",
    "window_tokens",
    "windows_published",
]


rule tables:
    input:
        CELLS,
    output:
        [
            report(
                f"{ROOT}/tables/{name}.csv",
                caption="../report/tables.rst",
                category="Tables",
                labels={"table": name},
            )
            for name in TABLES
        ],
        expand(f"{ROOT}/tables/{{name}}.md", name=TABLES),
        f"{ROOT}/tables/metrics.json",
        f"{ROOT}/tables/curves.csv",
    log:
        f"{ROOT}/logs/tables.log",
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
        "laid tables --config $CONFIG --cells {params.cells:q} --out {params.out:q} > {log:q} 2>&1"
