PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check
# JAX for the GPU where there is one; `make demo EXTRA=` takes that for CPUs all the same, and `EXTRA=[tpu]` that for TPUs.
EXTRA ?= $(if $(shell command -v nvidia-smi),[cuda])

.PHONY: demo studio test soak evaluate bench check clean
.DEFAULT_GOAL := demo

demo: .venv/core  ## clips, a LoRA, a GIF, the merged adapter: the whole line in minutes
	.venv/bin/python -m anidiff_jax.shapes.demo --output demo

studio: .venv/studio  ## a page to make, compare and watch videos, on the embedded model
	.venv/bin/python studio.py

test: .venv/test  ## parity with PyTorch, and everything else
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest

soak: .venv/test  ## the tests that take long: kill and resume at random moments, millions of rows
	JAX_PLATFORMS=cpu .venv/bin/python -m pytest -m soak -n 0

evaluate: .venv/dev  ## does training work? the long evaluations of the embedded world, as tables
	.venv/bin/python benchmarks/shapes.py

bench: .venv/dev  ## speed and memory beside PyTorch diffusers, at full size
	.venv/bin/python benchmarks/run.py
	.venv/bin/python benchmarks/choices.py
	.venv/bin/python benchmarks/startup.py
	.venv/bin/python benchmarks/loading.py
	.venv/bin/python benchmarks/conversion.py

check: .venv/dev  ## style and types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/core: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'this needs Python 3.11 or newer: make … PYTHON=python3.12'; exit 2; }
	$(PYTHON) -m venv .venv
	$(PIP) install --quiet --editable '.$(EXTRA)'
	touch $@

.venv/studio: pyproject.toml | .venv/core
	$(PIP) install --quiet --editable '.[studio]'
	touch $@

.venv/test: pyproject.toml tests/constraints.txt | .venv/core
	$(PIP) install --quiet --editable '.[test]' --constraint tests/constraints.txt
	touch $@

.venv/dev: .venv/test
	$(PIP) install --quiet --editable '.[dev]' --constraint tests/constraints.txt
	touch $@

clean:  ## the environment and the tests' compile cache; not what you made, nor ~/.cache/anidiff-jax
	rm -rf .venv .cache
