# The two commands of the README are `make main` and `make test`; `make help` lists the rest.

PYTHON ?= python3.11
PROFILE ?= auto
ENVIRONMENT := .venv/installed
RUN := .venv/bin/python
# Where PyTorch's wheels come from, such as https://download.pytorch.org/whl/cu126; empty for pip's own index.
# An installation stays with the one that it was made with.
INSTALLED_FROM := $(shell cat $(ENVIRONMENT) 2>/dev/null)
TORCH_INDEX ?= $(INSTALLED_FROM)

.PHONY: main test data evidence report gpu-check lint clean help other-torch

main: $(ENVIRONMENT)  ## run the study: notebooks in order, plots in images/, numbers in results/
	@$(RUN) Hardware.py
	$(RUN) RunNotebooks.py --profile $(PROFILE)

test: $(ENVIRONMENT)  ## check modules, notebooks, and that the documents show what results/ says
	OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses 2 --dist loadscope
	$(RUN) Report.py --check
	$(RUN) Sweeps.py --check
	$(RUN) Usefulness.py --check
	$(RUN) DevelopmentReport.py --check
	$(RUN) benchmarks/report.py --check

data: $(ENVIRONMENT)  ## fetch CIFAR-10 and CIFAKE without running anything
	$(RUN) Experiment.py --prepare-data

evidence: $(ENVIRONMENT)  ## every arm under PROFILE=cpu or PROFILE=full, then the notebooks
	@case "$(PROFILE)" in cpu|full) ;; *) echo "Choose PROFILE=cpu or PROFILE=full." >&2; exit 2;; esac
	@$(RUN) Hardware.py
	$(RUN) Experiment.py --arm all --profile $(PROFILE)
	$(RUN) RunNotebooks.py --profile $(PROFILE)

report: $(ENVIRONMENT)  ## redraw the committed plots and the documents' tables from results/
	$(RUN) Report.py
	$(RUN) Sweeps.py
	$(RUN) Usefulness.py
	$(RUN) DevelopmentReport.py
	$(RUN) benchmarks/report.py

gpu-check:  ## on a machine with a GPU: does it work, and how fast? At most ten minutes, installs nothing
	$(if $(wildcard $(ENVIRONMENT)),$(RUN),python3) benchmarks/gpu_check.py

lint: $(ENVIRONMENT)  ## style and simple faults
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

clean:  ## remove the environment and what smoke and quick runs wrote; evidence and data stay
	rm -rf .venv .pytest_cache .ruff_cache __pycache__ tests/__pycache__
	rm -rf results/smoke results/quick images/smoke images/quick models/smoke models/quick
	rm -rf models/checkpoints/smoke models/checkpoints/quick

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18
	@echo "  PROFILE=smoke|quick|cpu|full|auto (default) chooses how much 'make main' computes."
	@echo "  TORCH_INDEX=URL chooses the index of PyTorch's wheels, for another CUDA version."

# The mark is written after everything is installed, so that an interrupted installation is repeated.
# pip would leave another build of the same PyTorch version in place, so that is removed before.
$(ENVIRONMENT): requirements.lock
	$(PYTHON) -m venv .venv
ifneq ($(TORCH_INDEX),)
	.venv/bin/pip install --quiet --index-url '$(TORCH_INDEX)' $$(grep -E '^torch(vision)?==' requirements.lock)
endif
	.venv/bin/pip install --quiet --requirement requirements.lock
	echo '$(TORCH_INDEX)' > $@

ifneq ($(TORCH_INDEX),$(INSTALLED_FROM))
$(ENVIRONMENT): other-torch
endif
other-torch:
	test ! -x .venv/bin/pip || .venv/bin/pip uninstall --quiet --yes torch torchvision
