# `make finetune` and `make test` set everything up in .venv by themselves, once.
# PYTHON chooses the interpreter it is made with (3.11 or newer), ARGS goes to the example, pytest or benchmarks.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help finetune test test-demo lint format docs bench clean

help:
	@echo "make finetune   teach a small encoder inside LLaVA to read handwriting: outputs/finetune;"
	@echo "                interrupted and started again, it goes on where it was"
	@echo "make test       run the tests"
	@echo "make test-demo  run the tests of the demo, in headless Chromium if there is one; Gradio brings an older Pillow"
	@echo "make lint       check format and style"
	@echo "make format     mend format and style"
	@echo "make docs       build the site in build/site; a broken link is an error"
	@echo "make bench      measure time and memory beside transformers' Unlimited-OCR: outputs/benchmarks.json;"
	@echo "                ARGS=--quick takes minutes, ARGS=--help says what there is"
	@echo "make clean      remove .venv and what was built"

finetune: $(VENV)/.train
	$(BIN)/python examples/finetune.py --resume_from_checkpoint true $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(ARGS)

test-demo: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest tests/test_app.py $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# An extra is installed again only when what it is made of has changed.
$(VENV)/.train $(VENV)/.dev $(VENV)/.demo: $(VENV)/.%: setup.cfg pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	@touch $@
