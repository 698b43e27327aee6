# The words of daily work. They run in the active environment, or in the one of PYTHON=.venv/bin/python.

PYTHON ?= python

.PHONY: setup fmt lint test bench wheel size cuda-check cuda-all cuda-asan mutants

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

cuda-check:  # CUDA kernels, compiled without a device for sm_75 and sm_90
	$(PYTHON) tests/cuda_check.py

cuda-all:  # for sm_75 to sm_120, in every variant
	$(PYTHON) tests/cuda_check.py --all

cuda-asan:  # all tests of CUDA kernels under AddressSanitizer: half an hour
	$(PYTHON) tests/cuda_asan.py --all

mutants:  # faults planted in CUDA kernels, one at a time: hours; FILES="fill.cu tick.cu" for those of some
	$(PYTHON) tests/cuda_mutants.py $(FILES)

WHEELS ?= target/wheels

wheel:  # for every Linux of the last ten years; needs maturin[zig], zopfli and binutils
	maturin build --quiet --release --zig --compatibility manylinux2014 --compression-level 9 --out $(WHEELS) \
		-- -Clinker=$(CURDIR)/.ci/dense-cc
	$(PYTHON) .ci/repack.py $(WHEELS)/*.whl

size: wheel  # of the wheel: under 1.5 MB
	@stat --printf '%n: %s bytes\n' $(WHEELS)/*.whl
	@test $$(stat --format %s $(WHEELS)/*.whl) -lt 1500000
