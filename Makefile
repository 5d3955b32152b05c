# `make finetune` and `make test` set everything up in .venv by themselves, once, with the versions of constraints.txt.
# PYTHON chooses the interpreter it is made with (3.11 or newer), ARGS goes to the example, pytest or benchmarks.
# LATEST=1 takes the newest versions that setup.cfg allows, in .venv-latest.

PYTHON ?= python3
VENV := .venv$(if $(LATEST),-latest)
BIN := $(VENV)/bin
# Python compiles what is imported, once; to compile all of torch beforehand takes half of the time.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --no-compile
VERSIONS := $(if $(LATEST),--upgrade --upgrade-strategy eager,--constraint constraints.txt)

# Hundreds of processes start in the tests, and each would compile anew what it imports.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help finetune test test-demo test-official test-versions coverage lint format docs bench constraints clean

help:
	@echo "make finetune       teach a small encoder inside LLaVA to read handwriting: outputs/finetune;"
	@echo "                    interrupted and started again, it goes on where it was"
	@echo "make test           run the tests"
	@echo "make test-demo      run the tests of the demo, in headless Chromium if there is one"
	@echo "make test-official  fetch the official DeepSeek-OCR (6.7 GB), read a page with it, train it ten steps, write it"
	@echo "                    back and read again; needs a network, 20 GB of disk and of memory"
	@echo "make test-versions  run the most telling tests with the oldest and the newest versions, each in an"
	@echo "                    environment of its own; TORCH=tested leaves torch as it is, ARGS=--help says what there is"
	@echo "make coverage       run the tests and say which lines none of them reaches"
	@echo "make lint           check format, style and types"
	@echo "make format         mend format and style"
	@echo "make docs           build the site in build/site; a broken link is an error"
	@echo "make bench          measure time and memory beside transformers' Unlimited-OCR: outputs/benchmarks.json;"
	@echo "                    ARGS=--quick takes minutes, ARGS=--help says what there is"
	@echo "make constraints    write constraints.txt anew where setup.cfg has changed; ARGS=--upgrade takes newer versions"
	@echo "make clean          remove .venv and what was built"

finetune: $(VENV)/.train
	$(BIN)/python examples/finetune.py --resume_from_checkpoint true $(ARGS)

# Two processes of one thread each; a file's tests stay together, as they share what is large.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-demo: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest tests/test_app.py $(ARGS)

test-official: $(VENV)/.dev
	HF_HUB_OFFLINE=0 $(BIN)/python -m pytest tests/test_official.py -k official_checkpoint -s $(ARGS)

test-versions:
	$(PYTHON) .ci/test_versions.py $(if $(TORCH),--torch $(TORCH)) $(ARGS)

coverage: $(VENV)/.dev
	$(BIN)/python -m pytest --cov --cov-report=term-missing:skip-covered $(ARGS)

# An editable installation has no folder with the package's name, which mypy looks for.
# It does not stay: whatever walks through the folders would walk in a circle, mkdocs for one.
lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	mkdir -p build/types && ln -sfn ../.. build/types/deepseek_ocr_vision
	$(BIN)/mypy; passed=$$?; rm -r build/types; exit $$passed

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.dev
	$(BIN)/mkdocs build --strict $(ARGS)

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks $(ARGS)

constraints: | $(BIN)/python
	$(PIP_INSTALL) uv
	$(BIN)/uv pip compile setup.cfg --quiet --universal --all-extras --python-version 3.11 --no-annotate $(ARGS) \
		--custom-compile-command "make constraints" --output-file constraints.txt
	sed -E "s/ and implementation_name == 'cpython' and .*//; s/ ; python_full_version < '3.14'//" constraints.txt \
		> constraints.txt.new && mv constraints.txt.new constraints.txt

clean:
	rm -rf .venv .venv-latest build dist *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# An extra is installed again only when what it is made of has changed.
$(VENV)/.train $(VENV)/.dev $(VENV)/.demo: $(VENV)/.%: setup.cfg pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) $(VERSIONS) --editable '.[$*]'
	@touch $@
