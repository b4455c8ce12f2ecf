# `make demo` and `make test` are all a newcomer needs. Git, make and Python 3.11 or 3.12 are enough.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo report readme test fuzz chaos gpu lint format clean distclean

# Any Python 3.11 or 3.12: `make demo PYTHON=/path/to/python3.12`. Left empty, it is looked for.
PYTHON ?=
VENV := .venv
BIN := $(VENV)/bin
CORES ?= all
# Processes that share the tests, a file on one of them: two cores serve two. Each takes about 2 GB.
WORKERS ?= 2

# Broken files of each kind that `make fuzz` draws.
RUNS ?= 1000
# Times that `make chaos` kills a build.
KILLS ?= 20

export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
unexport PYTHONPATH
# Packages are compiled when they are first imported; jobs that may not keep that would each do it again, for five seconds.
unexport PYTHONDONTWRITEBYTECODE
# Snakemake keeps its cache below the home folder; where that cannot be written, in this one.
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
export XDG_CACHE_HOME := $(CURDIR)/.snakemake/cache
endif

help:
	@echo "make demo    install into .venv, run the small scale on all cores, print Tables 1, 2 and 3"
	@echo "make report  Snakemake's own HTML report beside the results page"
	@echo "make test    install test tools too, run the tests"
	@echo "make fuzz    RUNS (1000) broken files of every kind, new ones each time (docs/reliability.md)"
	@echo "make chaos   the ci configuration, killed KILLS (20) times and disturbed in other ways, gives the same bytes"
	@echo "make gpu     what only a GPU can show, on one of 80 GB: tests, speed, rehearsal (bench/GPU.md)"
	@echo "make lint    ruff, snakefmt, snakemake --lint, import-linter"
	@echo "make format  let ruff and snakefmt rewrite the sources"
	@echo "make clean   remove results; make distclean: .venv and caches too"

demo: $(VENV)/.demo
	@bash tools/demo.sh $(CORES)

report: $(VENV)/.demo
	@snakemake --cores $(CORES) all page
	@snakemake all page --report results/snakemake-report.html
	@echo "results/snakemake-report.html: the run as Snakemake tells it; results/<scale>/report.html: the results page"

# docs/results.md and the short table of README.md, from results/small.
readme: $(VENV)/.demo
	@python tools/readme.py results/small

test: $(VENV)/.dev
	@OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

fuzz: $(VENV)/.dev
	@LAID_FUZZ=$(RUNS) OMP_NUM_THREADS=1 python -m pytest -n $(WORKERS) tests/fuzz

chaos: $(VENV)/.demo
	@OMP_NUM_THREADS=1 python tools/chaos.py --config config.yaml configs/ci.yaml --kills $(KILLS)

gpu: $(VENV)/.dev
	@failed=0; \
	python -m pytest -m gpu tests/test_gpu.py || failed=1; \
	python bench/gpu.py --write || failed=1; \
	laid rehearse --config config.yaml configs/paper.yaml bench/pair.yaml --out results/rehearsal || failed=1; \
	exit $$failed

lint: $(VENV)/.dev
	ruff check .
	ruff format --check .
	snakefmt --check Snakefile workflow/rules
	snakemake --lint
	lint-imports --no-cache

format: $(VENV)/.dev
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow/rules

clean:
	rm -rf results

distclean: clean
	rm -rf $(VENV) .snakemake .pytest_cache .ruff_cache .hypothesis

# The stamps: an environment is made again when its lock (or what pyproject.toml asks for) changes. The locks pin every
# package but those that one build of torch alone needs (CUDA), which pip therefore resolves itself.
INSTALL := bash tools/install.sh $(BIN)/python

$(VENV)/.demo: envs/requirements.lock pyproject.toml
	@set -eu; python=$$(bash tools/find_python.sh "$(PYTHON)"); \
	echo "Installing the pinned packages into $(VENV) with $$("$$python" --version) ..."; \
	rm -rf $(VENV); \
	"$$python" -m venv $(VENV); \
	$(INSTALL) -r envs/requirements.lock; \
	$(INSTALL) --no-deps --no-build-isolation -e .; \
	touch $@

$(VENV)/.dev: $(VENV)/.demo envs/requirements-dev.lock
	@set -eu; echo "Installing the test tools into $(VENV) ..."; \
	$(INSTALL) -r envs/requirements.lock -r envs/requirements-dev.lock; \
	touch $@
