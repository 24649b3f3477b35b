# The two commands of the README are `make main` and `make test`; `make help` lists the rest.

PYTHON ?= python3.11
PROFILE ?= auto
ENVIRONMENT := .venv/installed
RUN := .venv/bin/python

.PHONY: main test data evidence report lint clean help

main: $(ENVIRONMENT)  ## run the study: notebooks in order, plots in images/, numbers in results/
	$(RUN) RunNotebooks.py --profile $(PROFILE)

test: $(ENVIRONMENT)  ## check modules, notebooks, and that the documents show what results/ says
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadscope
	$(RUN) Report.py --check
	$(RUN) DevelopmentReport.py --check
	$(RUN) benchmarks/report.py --check

data: $(ENVIRONMENT)  ## fetch CIFAR-10 and CIFAKE without running anything
	$(RUN) Experiment.py --prepare-data

evidence: $(ENVIRONMENT)  ## every arm under PROFILE=cpu or PROFILE=full, then the notebooks
	@case "$(PROFILE)" in cpu|full) ;; *) echo "Choose PROFILE=cpu or PROFILE=full." >&2; exit 2;; esac
	$(RUN) Experiment.py --arm all --profile $(PROFILE)
	$(RUN) RunNotebooks.py --profile $(PROFILE)

report: $(ENVIRONMENT)  ## redraw the committed plots and the documents' tables from results/
	$(RUN) Report.py
	$(RUN) DevelopmentReport.py
	$(RUN) benchmarks/report.py

lint: $(ENVIRONMENT)  ## style and simple faults
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove the environment and what smoke and quick runs wrote; evidence and data stay
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__
	rm -rf results/smoke results/quick images/smoke images/quick models/smoke models/quick
	rm -rf models/checkpoints/smoke models/checkpoints/quick

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 18
	@echo "  PROFILE=smoke|quick|cpu|full|auto (default) chooses how much 'make main' computes."

# Touched only after everything is installed, so that an interrupted installation is repeated.
$(ENVIRONMENT): requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet --requirement requirements.txt
	touch $@
