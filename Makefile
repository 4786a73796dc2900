# `make demo` and `make test` do all of their own set-up: they need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ZERO := .venv-deepspeed
ZERO_PINS := hjson==3.1.0 ninja==1.13.2 py-cpuinfo==9.0.0 msgpack==1.2.4
FLASHTRACE := .venv-flashtrace
APP := .venv-app
LOWEST := .venv-lowest
LOWEST_STAMP := $(LOWEST)/.installed
# What depends on the versions of torch, transformers and nnsight: the families of models, read.
LOWEST_TESTS := $(addprefix tests/,test_versions.py attention/test_adapter.py \
	attention/test_head_mean.py reading/test_model_unchanged.py reading/test_reader.py \
	reading/test_self_check.py trace/test_tracer.py)
# Whole files to a worker, since the tests of a file share models; a worker takes about 2 GB.
WORKERS ?= --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test test-lowest deepspeed flashtrace app bench gpu ablation conformance docs lint types package \
	reasoner clean

demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest $(WORKERS)

conformance: $(STAMP)
	$(BIN)/python -m tests.conformance $(if $(TYPES),--types $(TYPES))

# Takes two hours of an idle machine; make bench ONLY="flow_stage" runs one of them.
bench: flashtrace
	$(BIN)/python -m benchmarks $(ONLY)

# On a machine with a GPU: what has not run on one yet, in an hour. A CUDA build of torch that is
# installed is used as it is, also one in a virtual environment that PYTHON belongs to.
gpu:
	$(PYTHON) -m venv --system-site-packages .venv-gpu
	$(PYTHON) -c "import site; print(site.getsitepackages()[0])" \
		> "$$(.venv-gpu/bin/python -c 'import site; print(site.getsitepackages()[0])')/flowtracer.pth"
	.venv-gpu/bin/python -m benchmarks.found_torch > .venv-gpu/found.txt
	.venv-gpu/bin/python -m pip install --quiet --constraint .venv-gpu/found.txt --editable ".[all,dev]"
	.venv-gpu/bin/python -m benchmarks.first_gpu $(ARGS)

# Takes a few hours of two cores; it goes on where it was broken off.
ablation: $(STAMP)
	$(BIN)/python -m examples.ablation $(ARGS)

test-lowest: $(LOWEST_STAMP)
	$(LOWEST)/bin/python -m pytest $(WORKERS) $(LOWEST_TESTS)

# DeepSpeed beside the environment, not in it: libraries behave otherwise where it is installed.
deepspeed: $(STAMP)
	$(PYTHON) -m venv $(ZERO)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> "$$($(ZERO)/bin/python -c 'import site; print(site.getsitepackages()[0])')/flowtracer.pth"
	$(ZERO)/bin/python -m pip install --quiet --no-deps $(ZERO_PINS) setuptools wheel
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(ZERO)/bin/python -m pip install --quiet --no-deps \
		--no-build-isolation deepspeed==0.19.8

# FlashTrace, which a benchmark compares with, beside the environment: it brings thirty packages.
flashtrace: $(STAMP)
	$(PYTHON) -m venv $(FLASHTRACE)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> "$$($(FLASHTRACE)/bin/python -c 'import site; print(site.getsitepackages()[0])')/flowtracer.pth"
	$(FLASHTRACE)/bin/python -m pip install --quiet --no-deps --requirement constraints-flashtrace.txt

# Gradio beside the environment, not in it: it takes older versions of Pillow and tomlkit.
app: $(STAMP)
	$(PYTHON) -m venv $(APP)
	$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
		> "$$($(APP)/bin/python -c 'import site; print(site.getsitepackages()[0])')/flowtracer.pth"
	$(APP)/bin/python -m pip install --quiet --no-deps --requirement constraints-app.txt

docs: $(STAMP)
	$(BIN)/sphinx-build --quiet --fresh-env -W --keep-going -c docs . build/docs

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

package: $(STAMP)
	$(BIN)/python tests/check_wheel.py

reasoner: $(STAMP)
	$(BIN)/python examples/reasoner/train.py

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[all,dev]"
	touch $(STAMP)

$(LOWEST_STAMP): pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --upgrade pip
	$(LOWEST)/bin/python -m pip install --quiet --requirement constraints-lowest.txt --editable .
	touch $(LOWEST_STAMP)

clean:
	rm -rf $(VENV) $(LOWEST) $(ZERO) $(FLASHTRACE) $(APP) .venv-gpu build dist .pytest_cache .mypy_cache .ruff_cache
