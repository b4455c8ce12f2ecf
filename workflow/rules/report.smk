# Figures, the ledger of claims, and the results page, built from cells (and training logs, where runs are at hand).


localrules:
    figures,
    claims,
    report_page,


rule figures:
    input:
        CELLS,
        analysis=ANALYSES,
        alignability=ALIGNABILITY,
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
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 4),
    shell:
        "laid figures --config $CONFIG --cells {params.cells:q} --out {output:q} > {log:q} 2>&1"


rule claims:
    input:
        CELLS,
        analysis=ANALYSES,
        alignability=ALIGNABILITY,
        costs=COSTS,
        ledger=ledger(),
        pope=POPE_CELLS,
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
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 4),
        out=lambda wildcards, output: above(output.json),
    shell:
        "laid claims --config $CONFIG --cells {params.cells:q} --ledger {input.ledger:q} --out {params.out:q} > {log:q} 2>&1"


rule report_page:
    input:
        CELLS,
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
    threads: cores("tables")
    resources:
        **ask("tables"),
    params:
        relevant=relevant("tables"),
        cells=lambda wildcards, input: above(input[0], 4),
    shell:
        "laid report --config $CONFIG --cells {params.cells:q} --figures {input.figures:q} --claims {input.claims:q}"
        " --out {output:q} > {log:q} 2>&1"
