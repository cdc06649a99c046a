# `make quickstart` and `make test` need Python 3.10 or later, make and git; they make their own environment in .venv.

PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python

# Where an image sets this, every process compiles MLflow anew: 5 s of CPU instead of 2 for each of hundreds.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test test-all test-fast test-smoke test-lowest test-spark test-torch faults sanitize fuzz audit dist lint docs site blocks check-python clean

quickstart: $(VENV)/.rtx
	$(RUN) examples/quickstart.py

docs: $(VENV)/.dev
	$(RUN) docs/generate_cli_page.py

# The documentation as a site, in site/. A link that leads nowhere is an error.
site: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet
	@echo "The site is in site/; $(RUN) -m mkdocs serve shows it while it is edited."

# How many blocks of code of README and docs are run by tests, and why the others are not.
blocks: | $(VENV)/bin/python
	$(RUN) tests/tools/doc_blocks.py

# Two processes, since that is what most machines for tests have. Each gets one file after the other, the long ones
# first (tests/conftest.py): servers and models that the tests of a file share are made once. PYTEST_OPTIONS adds to it:
# --cov, or -k NAME; of several -m, the last one counts, which is that of the target.
PYTEST_OPTIONS ?=
PYTEST = DO_NOT_TRACK=true $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

# All fast tests, and of the slow ones at least the main case of each feature; minutes.
test: $(VENV)/.dev
	$(PYTEST) -m "not exhaustive"

# Their further cases, too: what CI runs.
test-all: $(VENV)/.dev
	$(PYTEST)

# What to run while editing: no servers, no MLflow stores, nothing that takes seconds.
test-fast: $(VENV)/.dev
	$(PYTEST) -m "not (slow or server or store or gpu)"

# What another Python would break first, one file at a time: make test-smoke PYTHON=python3.13 VENV=.venv-3.13
test-smoke: $(VENV)/.dev
	DO_NOT_TRACK=true $(RUN) -m pytest tests/project/test_public_api.py tests/project/test_distribution.py \
	  tests/convert/test_recipe.py tests/cli/test_cli.py tests/flavor/test_flavor.py

# The lowest versions that pyproject.toml allows. What they deprecate or warn of is not ours to mend, nor that the server
# of MLflow 3.10 does not start with starlette 1.
test-lowest: | $(VENV)/bin/python
	$(RUN) -m pip install --quiet 'uv>=0.9'
	$(RUN) -m uv venv --quiet --seed --clear --python $(PYTHON) $(VENV)-lowest
	$(RUN) -m uv pip install --quiet --python $(VENV)-lowest/bin/python --resolution lowest-direct \
	  --editable '.[rtx,dev]' 'starlette>=0.40,<1'
	DO_NOT_TRACK=true $(VENV)-lowest/bin/python -m pytest -o filterwarnings=ignore

# torch for the CPU: PyPI's own builds bring CUDA, so name an index of CPU builds where pip does not know one.
TORCH_INDEX ?=
test-torch: $(VENV)/.dev
	$(RUN) -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) --editable '.[test-torch]'
	DO_NOT_TRACK=true HF_HUB_OFFLINE=1 $(RUN) -m pytest --durations=10 \
	  tests/registry/test_sources.py tests/registry/test_torch_sources.py tests/whole tests/measure/test_whole_benchmark.py
	DO_NOT_TRACK=true $(RUN) -m pytest tests/project/test_examples.py -k pytorch

# Everything that reads something from outside, for so many seconds each: make fuzz SECONDS=600 TARGETS="onnx record".
SECONDS ?= 30
TARGETS ?=
fuzz: $(VENV)/.dev
	$(RUN) -m pip install --quiet --editable '.[fuzz]'
	DO_NOT_TRACK=true $(RUN) tests/tools/fuzz.py --seconds $(SECONDS) $(TARGETS)

# What users install, in an environment of its own: its known vulnerabilities, and a list of what it holds. Without
# --strict, the audit would pass where the service that knows them cannot be asked.
SHIPPED = $(VENV)-shipped
$(SHIPPED)/.done: pyproject.toml | $(VENV)/bin/python
	$(PYTHON) -m venv --clear $(SHIPPED)
	$(SHIPPED)/bin/python -m pip install --quiet --upgrade pip
	$(SHIPPED)/bin/python -m pip install --quiet '.[rtx,client,serve,signing,plots]'
	@touch $@

audit: $(SHIPPED)/.done | $(VENV)/.dev
	$(RUN) -m pip install --quiet --editable '.[release]'
	$(SHIPPED)/bin/python -m pip freeze --all --exclude mlflow-trt > $(SHIPPED)/requirements.txt
	$(RUN) -m pip_audit --strict --disable-pip --no-deps --requirement $(SHIPPED)/requirements.txt

dist: $(SHIPPED)/.done | $(VENV)/.dev
	rm -rf dist
	$(RUN) -m pip install --quiet --editable '.[release]'
	$(RUN) -m build --outdir dist/built
	mv dist/built/*.tar.gz dist
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(RUN) -m auditwheel repair --wheel-dir dist dist/built/*.whl   # names the systems that it runs on, as PyPI wants it
	rm -r dist/built
	$(RUN) -m twine check --strict dist/*
	$(RUN) -m cyclonedx_py environment --pyproject pyproject.toml --output-reproducible $(SHIPPED)/bin/python \
	  --output-file "dist/mlflow-trt-$$($(SHIPPED)/bin/mlflow-trt --version).cdx.json"

# Needs Java.
test-spark: $(VENV)/.dev
	$(RUN) -m pip install --quiet --editable '.[spark]'
	DO_NOT_TRACK=true $(RUN) -m pytest tests/deploy/test_spark.py

# Conversions killed, interrupted, failed and doubled, each at every request: docs/reliability.md has what came of it.
FAULTS_OPTIONS ?=
faults: $(VENV)/.dev
	PYTHONPATH=.:tests/support $(RUN) tests/tools/faults.py $(FAULTS_OPTIONS)

# The extension's own tests in C, with a stand-in for the GPU, under ThreadSanitizer, AddressSanitizer and UBSan, as far
# as the compiler has them and they run here.
SANITIZERS = thread address,undefined
NATIVE_PARTS = native/batcher.c native/copying.c
sanitize:
	@if ! command -v $(CC) >/dev/null; then \
	  echo "No C compiler here: the extension is not tested under sanitizers."; exit 0; fi; \
	mkdir -p native/build && for sanitizer in $(SANITIZERS); do \
	  probe=native/build/probe-$${sanitizer%%,*}; \
	  if ! { echo 'int main(void) { return 0; }' | \
	    $(CC) -x c - -fsanitize=$$sanitizer -o $$probe && $$probe; } 2>native/build/probe.log; then \
	    echo "Not tested under $$sanitizer, with which no program runs here: $$(tail -n 1 native/build/probe.log)"; continue; fi; \
	  for test in native/tests/test_*.c; do \
	    program=native/build/$$(basename $$test .c)-$${sanitizer%%,*} && echo "$$test under $$sanitizer" && \
	    $(CC) -std=c11 -O1 -g -Wall -Wextra -Werror -pthread -fsanitize=$$sanitizer -fno-sanitize-recover=all \
	      -o $$program $$test $(NATIVE_PARTS) && $$program || exit 1; \
	  done; done

lint: $(VENV)/.dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m mypy --config-file tests/mypy.ini tests benchmarks
	$(VENV)/bin/lint-imports

GPU := $(shell $(PYTHON) -c 'import ctypes; ctypes.CDLL("libcuda.so.1")' 2>/dev/null && echo yes)

$(VENV)/.rtx: pyproject.toml | $(VENV)/bin/python
	@echo "Installing mlflow-trt with TensorRT-RTX and ONNX Runtime (a few minutes the first time) ..."
	$(RUN) -m pip install --quiet --editable '.[rtx]'
ifeq ($(GPU),yes)
	@echo "There is a GPU: adding what calls it ..."
	$(RUN) -m pip install --quiet --editable '.[cuda-core]'
endif
	@touch $@

$(VENV)/.dev: $(VENV)/.rtx
	@echo "Installing the tools for tests ..."
	$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@

$(VENV)/.docs: $(VENV)/.rtx
	@echo "Installing the tools for the site ..."
	$(RUN) -m pip install --quiet --editable '.[docs]'
	@touch $@

$(VENV)/bin/python: | check-python
	@echo "Making an environment in $(VENV) ..."
	$(PYTHON) -m venv $(VENV)

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "Python 3.10 or later is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }

clean:
	rm -rf $(VENV) $(VENV)-lowest $(VENV)-shipped quickstart build dist site native/build *.egg-info
