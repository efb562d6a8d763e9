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
# What examples and C tests link with: an installation inside .build.
STAGE := $(CURDIR)/.build/stage

VERSION := $(shell sed -n 's/^package let versionText.*"\(.*\)"$$/\1/p' Sources/Halfstep/Exports.swift)
SERIES := $(basename $(VERSION))
SONAME := libhalfstep.so.0
