# laid: long-window distillation for vision-language models.
#   snakemake --cores all                                    the small scale of config.yaml
#   snakemake --cores all --configfile configs/ci.yaml       the same, cut down to a few minutes
#   snakemake --cores all --profile slurm --configfile configs/paper.yaml
from snakemake.utils import min_version

min_version("9.0")


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
include: "workflow/rules/pope.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/beyond.smk"
include: "workflow/rules/sweep.smk"
include: "workflow/rules/tune.smk"


rule all:
    default_target: True
    input:
        rules.tables.output,
        ALIGNABILITY,


# Figures, claims and the results page, with the analyses and POPE's questions behind them (`make report`).
rule page:
    input:
        rules.report_page.output,
        rules.pope.output,


# Coarse targets, which the stages of dvc.yaml name.
rule dataset:
    input:
        rules.haystacks.output,
        images("haystacks"),
        rules.haystacks_beyond.output if config.beyond.table else [],
        images("beyond") if config.beyond.table else [],


rule family:
    input:
        [checkpoint_files(member) for member in MEMBERS],
        LAYOUT.teacher_cache if LAYOUT.needs_cache() else [],


rule cells:
    input:
        CELLS,
