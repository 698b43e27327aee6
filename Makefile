# The words of daily work. They run in the active environment, or in the one of PYTHON=.venv/bin/python.

PYTHON ?= python

.PHONY: setup fmt lint test bench wheel size

setup:  # an environment in .venv, with kilter in place; again after a change of Rust code
	test -d .venv || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --editable '.[test]'

fmt:
	$(PYTHON) -m ruff format .
	$(PYTHON) -m ruff check --fix .
	cargo fmt

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(PYTHON) -m mypy.stubtest kilter._kilter
	cargo fmt --check
	cargo clippy --quiet --workspace --all-targets -- -D warnings

test:
	$(PYTHON) -m pytest
	cargo test --quiet --release -p kilter-core

bench:
	cargo bench -p kilter-core
	$(PYTHON) -m pytest benches

WHEELS ?= target/wheels

wheel:  # for every Linux of the last ten years; needs maturin[zig]
	maturin build --quiet --release --zig --compatibility manylinux2014 --compression-level 9 --out $(WHEELS) \
		-- -Clinker=$(CURDIR)/.ci/dense-cc

size: wheel  # of the wheel: under 1.75 MB
	@stat --printf '%n: %s bytes\n' $(WHEELS)/*.whl
	@test $$(stat --format %s $(WHEELS)/*.whl) -lt 1750000
