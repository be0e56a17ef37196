# What a person runs. On a fresh machine this needs python3 (3.10 or newer, with venv), a C++20
# compiler and make; everything else comes from PyPI into .venv. Stamp files keep a second run quick.
#
#   make demo [ARGS=...]          the demonstration; ARGS="--help" lists its options
#   make test                     C++ tests by ctest, then pytest
#   make bench NAME=... [ARGS=..] one benchmark; without NAME, what there is
#   make lint | make format       clang-format, ruff, mypy: check | rewrite
#   make sanitize                 C++ tests under ASan with UBSan, and under TSan
#   make emulator                 builds the CUDA driver emulator and prints the folder to put first on
#                                 LD_LIBRARY_PATH (no GPU result comes from it)
#   make stubs                    python/kvspan/_native.pyi from the built extension
#   make clean                    removes build/ and .venv
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
MAKEFLAGS += --no-builtin-rules

VENV := .venv
PY := $(VENV)/bin/python
# The build tools of the virtual environment come before the machine's.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
# Lets a caller choose: make PYTHON=python3.12 test
PYTHON ?=
ARGS ?=
NAME ?=

PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt
# No isolation: the extension's build folder stays valid, so that a rebuild compiles what changed.
INSTALL_SELF := $(PIP_INSTALL) --no-build-isolation
BUILD_TOOLS := cmake ninja $(shell sed -n 's/^requires = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ',')

CPP_SOURCES := $(shell find vmm flash_compat/kernel -name '*.cpp' -o -name '*.hpp' -o -name CMakeLists.txt)
CPP_FILES := $(shell find vmm flash_compat tests/cpp tests/emulator bench/cpp -name '*.cpp' -o -name '*.hpp' 2>/dev/null)
PYTHON_FILES := $(wildcard python bench tools tests flash_compat examples)

.PHONY: help demo test test-cpp test-python test-emulator bench lint format sanitize sanitize-address \
        sanitize-thread emulator stubs build clean

help:
	@sed -n '/^#   make/s/^#   //p' Makefile

# ---- the environment ----

$(PY):
	@python=""; \
	for candidate in $(or $(PYTHON),python3 python3.13 python3.12 python3.11 python3.10 python); do \
	  if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' \
	      >/dev/null 2>&1; then python="$$candidate"; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
	  echo "make: no Python 3.10 or newer with the venv module found" \
	       "(Debian: apt install python3-venv); name one with PYTHON=..." >&2; exit 1; \
	fi; \
	echo "== creating $(VENV) with $$("$$python" --version)"; \
	"$$python" -m venv $(VENV)

$(VENV)/.tools: pyproject.toml constraints.txt | $(PY)
	@echo "== installing the build tools"
	@$(PIP_INSTALL) $(BUILD_TOOLS)
	@touch $@

# The package itself, editable, and what it needs.
$(VENV)/.native: $(VENV)/.tools CMakeLists.txt $(CPP_SOURCES)
	@echo "== building and installing kvspan (the first time also torch: minutes)"
	@$(INSTALL_SELF) --config-settings=cmake.define.KVSPAN_WERROR=ON -e .
	@touch $@

# What an extra of pyproject.toml (demo, test, lint) needs besides.
$(VENV)/.extra-%: $(VENV)/.tools | $(VENV)/.native
	@echo "== installing what '$*' needs"
	@$(INSTALL_SELF) --config-settings=cmake.define.KVSPAN_WERROR=ON -e '.[$*]'
	@touch $@

build: $(VENV)/.native

# ---- running ----

# OpenMP's threads spin while they wait, which is ruinous when somebody else wants the cores.
demo: $(VENV)/.native $(VENV)/.extra-demo
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(VENV)/bin/kvspan demo $(ARGS)

bench: $(VENV)/.native $(VENV)/.extra-test
	@$(PY) bench/run.py $(or $(NAME),--list) $(ARGS)

# Alone on the last line: the folder.
emulator: $(VENV)/.tools
	@cmake -S tests/emulator -B build/emulator -G Ninja --log-level=WARNING \
	  -DKVSPAN_CUDA_INCLUDE="$(abspath $(CUDA_INCLUDE))" >&2
	@cmake --build build/emulator >&2
	@echo "$(CURDIR)/build/emulator/emulator"

stubs: $(VENV)/.native $(VENV)/.extra-test
	@$(PY) tools/stubs.py

# NVIDIA's header, of the build requirement nvidia-cuda-runtime.
CUDA_INCLUDE = $(dir $(lastword $(sort $(wildcard \
  $(VENV)/lib/python*/site-packages/nvidia/*/include/cuda.h))))

# ---- testing ----

# $(call cpp_build,FOLDER,OPTIONS): configures and builds the C++ tests.
define cpp_build
cmake -S . -B $(1) -G Ninja --log-level=WARNING -DKVSPAN_PYTHON=OFF -DKVSPAN_TESTS=ON \
  -DBOOST_HEADERS="$$($(PY) -c 'import boost_headers; print(boost_headers.get_include())')" \
  -DKVSPAN_CUDA_INCLUDE="$(abspath $(CUDA_INCLUDE))" $(2)
cmake --build $(1)
endef
CTEST := ctest --output-on-failure --no-tests=error --parallel $(shell nproc)

test: test-cpp test-python test-emulator

test-cpp: $(VENV)/.extra-test
	@echo "== C++ tests"
	@$(call cpp_build,build/cpp,-DKVSPAN_BENCH=ON)
	@$(CTEST) --test-dir build/cpp

test-python: $(VENV)/.native $(VENV)/.extra-test
	@echo "== Python tests"
	@$(PY) -m pytest $(ARGS)

# The API on the driver emulator: device="cuda:0" without a GPU. And other people's clients, which show
# that the emulator is like the driver.
test-emulator: emulator $(VENV)/.native $(VENV)/.extra-test $(VENV)/.extra-test-cuda
	@echo "== Python tests on the CUDA driver emulator"
	@LD_LIBRARY_PATH="$(CURDIR)/build/emulator/emulator:$${LD_LIBRARY_PATH:-}" \
	  $(PY) -m pytest tests/emulator_api
	@LD_LIBRARY_PATH="$(CURDIR)/build/emulator/emulator:$${LD_LIBRARY_PATH:-}" \
	  $(PY) -m pytest tests/emulator_clients
	@LD_LIBRARY_PATH="$(CURDIR)/build/emulator/emulator:$${LD_LIBRARY_PATH:-}" \
	  KVSPAN_TEST_DEVICE=cuda:0 KVSPAN_EMULATOR=granularity=64KiB,recommended=64KiB,visible=1,eager=1,garbage=1 \
	  $(PY) -m pytest tests/python

sanitize: sanitize-address sanitize-thread

sanitize-address: $(VENV)/.extra-test
	@echo "== C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@$(call cpp_build,build/asan,-DKVSPAN_SANITIZE=address$(comma)undefined)
	@ASAN_OPTIONS=detect_stack_use_after_return=1 \
	  UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 $(CTEST) --test-dir build/asan

# TSan's shadow memory of older compilers collides with addresses that newer kernels randomise
# over; setarch -R turns that off, where the machine lets it.
sanitize-thread: $(VENV)/.extra-test
	@echo "== C++ tests under ThreadSanitizer"
	@$(call cpp_build,build/tsan,-DKVSPAN_SANITIZE=thread)
	@fixed=""; if setarch "$$(uname -m)" -R true 2>/dev/null; then fixed="setarch $$(uname -m) -R"; fi; \
	  TSAN_OPTIONS=halt_on_error=1:second_deadlock_stack=1 $$fixed $(CTEST) --test-dir build/tsan

# ---- style ----

lint: $(VENV)/.native $(VENV)/.extra-lint
	@echo "== clang-format"
	@clang-format --dry-run --Werror $(CPP_FILES)
	@echo "== ruff"
	@ruff check $(PYTHON_FILES)
	@ruff format --check $(PYTHON_FILES)
	@echo "== mypy"
	@mypy

format: $(VENV)/.extra-lint
	@clang-format -i $(CPP_FILES)
	@ruff check --fix $(PYTHON_FILES)
	@ruff format $(PYTHON_FILES)

clean:
	rm -rf build $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis

comma := ,
