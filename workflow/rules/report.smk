# Figures, the ledger of claims, and the results page, built from cells (and training logs, where runs are at hand).


localrules:
    figures,
    claims,
    report_page,


rule figures:
    input:
        [f"{ROOT}/cells/{cell}" for cell in CELLS],
        analysis=ANALYSES,
    output:
        report(
            directory(f"{ROOT}/figures"),
            patterns=["{name}.svg"],
            caption="../report/figures.rst",
            category="Figures",
            labels={"figure": "{name}"},
        ),
    log:
        f"{ROOT}/logs/figures.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 3),
    shell:
        "laid figures --config $CONFIG --cells {params.cells} --out {output} > {log} 2>&1"


rule claims:
    input:
        [f"{ROOT}/cells/{cell}" for cell in CELLS],
        analysis=ANALYSES,
        costs=COSTS,
        ledger=LEDGER,
        # Where it has been made (`snakemake pope`), the claim about standard benchmarks rests on it.
        pope=[p for p in [f"{ROOT}/pope/pope.csv"] if Path(p).exists()],
    output:
        json=f"{ROOT}/claims/claims.json",
        markdown=report(
            f"{ROOT}/claims/claims.md",
            caption="../report/claims.rst",
            category="Claims",
        ),
    log:
        f"{ROOT}/logs/claims.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 3),
        out=lambda wildcards, output: above(output.json),
    shell:
        "laid claims --config $CONFIG --cells {params.cells} --ledger {input.ledger} --out {params.out} > {log} 2>&1"


rule report_page:
    input:
        [f"{ROOT}/cells/{cell}" for cell in CELLS],
        figures=f"{ROOT}/figures",
        claims=f"{ROOT}/claims/claims.json",
    output:
        report(
            f"{ROOT}/report.html",
            caption="../report/page.rst",
            category="Results page",
        ),
    log:
        f"{ROOT}/logs/report.log",
    conda:
        "../../envs/laid.yaml"
    threads: ask("tables", "threads")
    resources:
        mem_mb=ask("tables", "mem_mb"),
        runtime=ask("tables", "runtime"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 3),
    shell:
        "laid report --config $CONFIG --cells {params.cells} --figures {input.figures} --claims {input.claims}"
        " --out {output} > {log} 2>&1"
