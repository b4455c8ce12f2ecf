# laid: long-window distillation for vision-language models.
#   snakemake --cores all                                    the small scale of config.yaml
#   snakemake --cores all --configfile configs/ci.yaml       the same, cut down to a few minutes
#   snakemake --cores all --profile slurm --configfile configs/paper.yaml


configfile: "config.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/models.smk"
include: "workflow/rules/distill.smk"
include: "workflow/rules/evaluate.smk"
include: "workflow/rules/tables.smk"
include: "workflow/rules/analysis.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/beyond.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/pope.smk"


rule all:
    default_target: True
    input:
        rules.tables.output,


# Figures, claims and the results page, with the analyses behind them (`make report`).
rule page:
    input:
        rules.report_page.output,


# Coarse targets, which the stages of dvc.yaml name.
rule dataset:
    input:
        rules.haystacks.output,
        LONG_ASKED,
        IMAGES,


rule family:
    input:
        [checkpoint_files(member) for member in [TEACHER, *STUDENTS]],
        f"{ROOT}/teacher_cache/index.json",


rule baselines:
    input:
        [f"{ROOT}/cells/{cell}" for cell in CELLS if cell.split("/")[1] not in ABLATED],


rule distill:
    input:
        [f"{ROOT}/cells/{cell}" for cell in CELLS if cell.split("/")[1] in ABLATED],
