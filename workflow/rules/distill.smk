# Post-training of the students: SFT, KD, LAid and its ablations, one job per student, method and seed.


rule train:
    input:
        unpack(training_inputs),
        student=student_files,
        features=student_features,
        images=images("haystacks"),
    output:
        directory(f"{ROOT}/runs/{{student}}/{{method}}/seed{{seed}}"),
    log:
        f"{ROOT}/logs/train/{{student}}-{{method}}-seed{{seed}}.log",
    benchmark:
        f"{ROOT}/benchmarks/train/{{student}}-{{method}}-seed{{seed}}.tsv"
    wildcard_constraints:
        method="|".join(filter(LAYOUT.is_trained, config.methods)),
    # What needs no teacher fills the cores while the teacher is being made.
    priority: 70
    conda:
        "../../envs/laid.yaml"
    threads: cores("train")
    resources:
        **ask("train"),
    params:
        relevant=relevant("train"),
        student=student_checkpoint,
        coco=COCO,
        cache=lambda wildcards, input: learned_from(input),
    # Several GPUs: one process each, which share the student as training.parallel says.
    shell:
        "launch=(laid); [ {resources.gpu} -lt 2 ] ||"
        ' launch=(accelerate launch --config_file "$LAYOUT" --num_processes {resources.gpu} -m laid);'
        ' "${{launch[@]}}" train --config $CONFIG --method {wildcards.method} --seed {wildcards.seed}'
        " --student-name {wildcards.student} --student {params.student:q} {params.cache}"
        " --coco {params.coco:q} --questions {input.questions:q} --out {output:q}"
        " --threads {resources.cpus_per_task} 2>&1 | tee {log:q}"
