# SPDX-License-Identifier: Apache-2.0
# Every target sets up what it needs by itself; a second run finds it done.
SHELL := /bin/bash
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON := .venv/bin/python
PYTEST := $(PYTHON) -m pytest
SOURCES = $(wildcard virtmigrate sandbox tests benchmarks)
# The sandbox needs root: network and mount namespaces, and QEMU's files.
ROOT := $(if $(filter-out 0,$(shell id -u)),$(if $(shell command -v sudo),sudo -E))
SANDBOX := $(ROOT) $(PYTHON) -m sandbox
# Kinds that have to be tested: one whose parts are missing fails. LVM needs a virtual
# machine: `make test` takes a share of its tests, test-full all.
BACKENDS := dir,shared_dir,rbd,lvm
TESTARGS ?=
# Of the tests with Nova, which have options of their own: --full.
NOVATESTARGS ?=
# Each writes its figures to benchmarks/NAME.json.
BENCHMARKS := transfer cache snapshot migrate image clone

.PHONY: help setup image machine-image stock-image demo test test-unit test-functional test-nova test-full lint format \
	bench sandbox sandbox-down clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-16s %s\n", $$1, $$2 }' Makefile

setup: ## Install Debian packages and make .venv
	@tools/setup

image: setup
	@timeout -k 10 300 $(PYTHON) -m sandbox image >/dev/null

machine-image: setup
	@timeout -k 10 900 $(SANDBOX) machine-image >/dev/null

stock-image: setup
	@timeout -k 10 900 $(SANDBOX) stock-image >/dev/null

demo: image ## Move a running guest between two hosts, and watch it go on
	@timeout -k 10 300 $(SANDBOX) exec --own demo -- $(CURDIR)/$(PYTHON) -m sandbox.demo

test: test-unit test-functional test-nova ## Run all tests but the long ones

test-unit: setup ## Run the unit tests: no root, no hosts
	@timeout -k 10 300 $(PYTEST) tests/unit -n 2 $(TESTARGS)

test-functional: image $(if $(findstring lvm,$(BACKENDS)),machine-image) ## Run the functional tests on hosts of their own
	@timeout -k 60 3640 tools/functional --durations=25 \
		--require-backends=$(BACKENDS) $(TESTARGS)

test-nova: image ## Run Nova with this driver, on hosts of their own
	@tools/setup-nova
	@timeout -k 60 1800 $(SANDBOX) exec --own nova -- \
		$(CURDIR)/.venv-nova/bin/python -m pytest tests/nova --durations=10 \
		--timeout 400 -W ignore $(NOVATESTARGS)

test-full: image machine-image stock-image test-unit ## Run all tests, the long ones too
	@timeout -k 60 14400 $(SANDBOX) exec --own test -- \
		timeout -k 30 14300 $(PYTEST) tests/functional \
		--require-backends=$(BACKENDS) --full $(TESTARGS)

lint: setup ## Check style, format and types
	@.venv/bin/ruff check $(SOURCES)
	@.venv/bin/ruff format --check $(SOURCES)
	@.venv/bin/mypy $(SOURCES)

format: setup ## Format the sources
	@.venv/bin/ruff check --fix $(SOURCES)
	@.venv/bin/ruff format $(SOURCES)

bench: image ## Measure transfers, beside what else would be used
	@tools/setup-bench
	@for name in $(BENCHMARKS); do \
		timeout -k 10 1800 $(SANDBOX) exec --own bench -- \
			$(CURDIR)/$(PYTHON) -m benchmarks.$$name || exit 1; \
	done

sandbox: image ## Leave two libvirt hosts up to play with
	@timeout -k 10 120 $(SANDBOX) up play alpha beta

sandbox-down: setup ## Take the hosts of `make sandbox` away
	@timeout -k 10 120 $(SANDBOX) down play

clean: ## Remove what was built: .venv, caches, sandboxes
	@if [ -x $(PYTHON) ]; then $(SANDBOX) down --all; fi
	$(ROOT) rm -rf .venv .venv-nova .setup.lock .setup-nova.lock .cache build dist *.egg-info \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis
