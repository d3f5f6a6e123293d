# The front door. Every target is one line into a task of tasks.py; `make` alone lists them.

PYTHON ?= python3
VENV   ?= .venv

MODEL     ?= tiny-qwen2
MODEL_DIR ?=
PROMPT    ?=
OUT       ?= out
PARALLEL  ?=
FORCE     ?=
ARGS      ?=
PEER      ?=
REPORT    ?=
TORCH     ?=
WHEELS    ?=
ENGINE    ?= auto
BACKEND   ?= cpu
BASE_IMAGE ?=
MIRROR    ?=
VENDOR_IMAGE ?=
VENDOR_SHA256 ?=
VENDOR_LICENCE ?=

# Passed on as typed: make expands no $ in a prompt, and no shell reads it a second time.
SETTINGS = MODEL MODEL_DIR PROMPT OUT PARALLEL FORCE ARGS PEER REPORT TORCH WHEELS
SETTINGS += ENGINE BACKEND BASE_IMAGE MIRROR VENDOR_IMAGE VENDOR_SHA256 VENDOR_LICENCE
$(foreach name,$(SETTINGS),$(eval override $(name) := $$(value $(name))))
export $(SETTINGS)

INVOKE = "$(VENV)/bin/python" -m invoke
# Once the environment is whole its own Python looks after it, unless another one is asked for.
KEEPER = $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(VENV)/build.installed)),$(VENV)/bin/python,$(PYTHON))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build run test test-all lint bench engine page image base-image verify-reproducible wheels setup clean ready

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 } /^##( |$$)/ { print substr($$0, 4) }' Makefile

build: ready ## a checkpoint becomes a checked bundle in OUT/MODEL, and the bundle answers PROMPT
	@$(INVOKE) build

run: ready ## ask the bundle again: make run PROMPT='12+30='
	@$(INVOKE) run

test: ready ## everything a change must pass: lint, then the tests (ARGS='-k fetch' for a part of them)
	@$(INVOKE) test

test-all: ready ## the same, and the tests that need a browser, qemu, docker (requirements/system.apt)
	@$(INVOKE) test-all

lint: ready ## ruff and mypy only
	@$(INVOKE) lint

engine: ready ## only libax_engine, into board/engine/lib (ARGS='--machine aarch64 --into folder' for a board's)
	@$(INVOKE) engine

page: ready ## what the page of axrun serve shows Markdown with, by npm into board/axrun/serve/page/lib
	@$(INVOKE) page

bench: ready ## speed and memory on this machine, beside llama.cpp with PEER=llama.cpp (ARGS='-k load' for a part)
	@$(INVOKE) bench

image: ready ## the pinned container: where `make build` works from then on, with the same bytes
	@$(INVOKE) image

base-image: ready ## the container's base from Debian packages, where no image registry can be reached
	@$(INVOKE) base-image

verify-reproducible: ready ## image and bundle built twice from nothing, and compared byte by byte
	@$(INVOKE) verify-reproducible

wheels: ready ## the wheels of a release, built twice and compared, in OUT/wheels
	@$(INVOKE) wheels

setup: ready ## only make VENV, with everything the other targets need, e.g. before going offline
	@$(INVOKE) setup

clean: ## remove out/ and the caches; VENV and downloaded checkpoints stay
	@$(if $(wildcard $(VENV)/build.installed),$(INVOKE) clean,rm -rf out)

# These build libax_engine while they install and check types.
test test-all: WITHOUT = --without-engine

ready:
	@command -v "$(KEEPER)" >/dev/null || \
	{ echo "error: no $(KEEPER) here: on Debian or Ubuntu, apt-get install python3 python3-venv" >&2; exit 2; }
	@"$(KEEPER)" requirements/install.py $(WITHOUT) "$(VENV)" build

##
## MODEL=tiny-qwen2    one of models/*.toml, or a repository of the Hugging Face Hub: MODEL=owner/name
## MODEL_DIR=folder    its checkpoint, where there is no network
## PROMPT='1+1='       what to ask                       OUT=out              where bundles go
## PARALLEL=cores      layers compiled at a time         FORCE=1              replace a different bundle
## ARGS='...'          more flags for the command        WHEELS=folder        more wheels to install from
## PYTHON=python3.12   another Python (3.11 to 3.14)     VENV=.venv           another environment
## TORCH=cpu           torch for a build's check: cpu, pypi (as the package index has it, 3 GB), or none: no check
## PEER=llama.cpp      what `make bench` measures beside  REPORT=1             write docs/benchmarks.md from it
## ENGINE=auto         auto, docker or local             BASE_IMAGE=image     another Debian image to build on
## BACKEND=cpu         cpu, or pulsar2 with VENDOR_IMAGE  MIRROR=address       another Debian mirror
##                     (VENDOR_SHA256, VENDOR_LICENCE)   see docs/container.md
