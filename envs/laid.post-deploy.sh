#!/usr/bin/env bash
# Runs in the fresh environment, in the folder Snakemake was started in.
set -eu
python -m pip install --quiet -r envs/requirements.lock
python -m pip install --quiet --no-deps --no-build-isolation -e .
