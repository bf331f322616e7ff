# Every target sets up its own environment. They need python3, pip, make and nothing else.

PYTHON ?= python3
VENV ?= .venv
# More arguments for the command that runs, such as ARGS="-k catalog" or ARGS="--out elsewhere".
ARGS ?=
# Processes that run tests at once: one for each core, at most four.
WORKERS ?= auto
PYTEST = $(VENV)/bin/python -m pytest -n $(WORKERS) --maxprocesses 4

.PHONY: help demo demo-real test test-fast test-real check attack lint format types docs reference test-kernels test-gguf clean

help:
	@echo "make demo   prune the bundled model with every strategy and print the table (4 minutes)"
	@echo "make demo-real  fetch SmolLM2-135M-Instruct (98 MB) and print the table for it (12 minutes on two cores)"
	@echo "make test   run all tests (14 minutes on two cores)"
	@echo "make test-fast  run the tests that are not marked slow (5 minutes on two cores)"
	@echo "make test-real  fetch SmolLM2-135M-Instruct (98 MB) and test on it (3 minutes on two cores)"
	@echo "make check  run the linter and the smoke tests (under a minute)"
	@echo "make attack  crash commands, fill disks, damage files, and count what goes wrong (up to 30 minutes)"
	@echo "make lint   check style, format and types; make format repairs the first two"
	@echo "make docs   build the documentation site in build/site, and check all its links (under a minute)"
	@echo "make reference  write docs/schema and docs/yaml-reference.md anew, after a change of options"
	@echo "make test-kernels  install Triton (1 GB) and test the kernels for CUDA devices in its interpreter"
	@echo "make test-gguf  build llama.cpp (some minutes) and test that it serves exported models"
	@echo "make clean  remove $(VENV) and what building left behind"
	@echo "PYTHON=python3.12 chooses the interpreter, ARGS=... is passed on"

demo: $(VENV)/.demo-ready
	@$(VENV)/bin/prunekit demo $(ARGS)

# ARGS="--windows 40" measures more, ARGS="--model HuggingFaceTB/SmolLM2-135M-Instruct" takes the hub's own weights.
demo-real: $(VENV)/.gguf-ready
	@$(VENV)/bin/prunekit demo --model smollm2-135m $(ARGS)

test: $(VENV)/.test-ready
	@$(PYTEST) $(ARGS)

test-fast: $(VENV)/.test-ready
	@$(PYTEST) -m "not slow and not real" $(ARGS)

test-real: $(VENV)/.test-ready
	@$(VENV)/bin/prunekit fetch smollm2-135m
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(VENV)/bin/python -m pytest -m real tests/test_real.py $(ARGS)

check: $(VENV)/.dev-ready
	@$(VENV)/bin/ruff check --quiet . && $(VENV)/bin/ruff format --check --quiet .
	@$(PYTEST) -m smoke $(ARGS)

attack: $(VENV)/.test-ready
	@$(VENV)/bin/python -m tools.attack $(ARGS)

lint: $(VENV)/.dev-ready types
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .

format: $(VENV)/.dev-ready
	@$(VENV)/bin/ruff check --quiet --fix .
	@$(VENV)/bin/ruff format .

# mypy finds the package by its import name through a link; it does not follow editable installations.
types: $(VENV)/.dev-ready
	@mkdir -p build/types && ln -sfn ../.. build/types/prunekit
	@$(VENV)/bin/mypy

docs: $(VENV)/.docs-ready
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build $(ARGS)
	@echo "open build/site/index.html"

# After a change of options: the schemas for editors and the YAML reference, which tests compare with the code.
reference: $(VENV)/.demo-ready
	@$(VENV)/bin/prunekit schema --built-in >docs/schema/pipeline.schema.json
	@$(VENV)/bin/prunekit schema --built-in --ablation >docs/schema/ablation.schema.json
	@$(VENV)/bin/prunekit schema --built-in --markdown >docs/yaml-reference.md

test-kernels: $(VENV)/.test-ready
	@"$(VENV)/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt triton
	@TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest tests/test_kernels.py $(ARGS)

# llama.cpp is built from its source distribution, which takes some minutes the first time.
test-gguf: $(VENV)/.test-ready
	@echo "installing llama-cpp-python into $(VENV); it is built from source, which takes some minutes the first time"
	@"$(VENV)/bin/python" -m pip install --disable-pip-version-check --quiet -c constraints.txt llama-cpp-python
	@$(VENV)/bin/python -m pytest tests/test_gguf_llama_cpp.py tests/test_gguf_served.py $(ARGS)

# Each stamp records an installation from these two files; a checkout that did not change is not installed twice.
$(VENV)/.demo-ready: pyproject.toml constraints.txt
	$(call install,.)

$(VENV)/.gguf-ready: pyproject.toml constraints.txt
	$(call install,.[gguf])

$(VENV)/.test-ready: pyproject.toml constraints.txt
	$(call install,.[test])

$(VENV)/.dev-ready: pyproject.toml constraints.txt
	$(call install,.[dev])

$(VENV)/.docs-ready: pyproject.toml constraints.txt
	$(call install,.[docs])

# The stamp is made only where pip succeeds: the pipe would hide its exit status.
define install
	@command -v "$(PYTHON)" >/dev/null || \
	    { echo "there is no $(PYTHON); name an interpreter: make $(MAKECMDGOALS) PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "prunekit needs Python 3.10 or newer, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
	@[ -x "$(VENV)/bin/pip" ] || "$(PYTHON)" -c 'import ensurepip' 2>/dev/null || \
	    { echo "$(PYTHON) cannot make environments; install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@[ -x "$(VENV)/bin/pip" ] || { echo "making the environment $(VENV)"; "$(PYTHON)" -m venv "$(VENV)"; }
	@echo "installing prunekit into $(VENV); the first time downloads torch and takes some minutes (log: $(VENV)/pip.log)"
	@rm -f "$@"
	@{ "$(VENV)/bin/python" -m pip install --disable-pip-version-check --progress-bar off --log "$(VENV)/pip.log" \
	      -c constraints.txt -e "$(1)" && touch "$@"; } | grep --line-buffered -E '^ *Downloading .* MB\)|^Installing' || true
	@[ -e "$@" ] || { echo "the installation failed; everything pip said is in $(VENV)/pip.log" >&2; exit 1; }
endef

clean:
	rm -rf "$(VENV)" build dist prunekit.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
