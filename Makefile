# Every target calls a task of tasks.py; `make` alone lists them.

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

# Exported verbatim: make expands no $ in a prompt, and no second shell interprets it.
SETTINGS = MODEL MODEL_DIR PROMPT OUT PARALLEL FORCE ARGS PEER REPORT TORCH WHEELS
SETTINGS += ENGINE BACKEND BASE_IMAGE MIRROR VENDOR_IMAGE VENDOR_SHA256 VENDOR_LICENCE
$(foreach name,$(SETTINGS),$(eval override $(name) := $$(value $(name))))
export $(SETTINGS)

INVOKE = "$(VENV)/bin/python" -m invoke
# A complete environment updates itself with its own Python, unless PYTHON names another one.
KEEPER = $(if $(and $(filter file,$(origin PYTHON)),$(wildcard $(VENV)/build.installed)),$(VENV)/bin/python,$(PYTHON))

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help build run test test-all lint bench engine page image base-image verify-reproducible wheels setup clean ready

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-20s %s\n", $$1, $$2 } /^##( |$$)/ { print substr($$0, 4) }' Makefile

build: ready ## compile a checkpoint into a checked bundle in OUT/MODEL, and run PROMPT
	@$(INVOKE) build

run: ready ## run another prompt with the bundle: make run PROMPT='12+30='
	@$(INVOKE) run

test: ready ## what every change must pass: lint, then the tests (ARGS='-k fetch' for a part of them)
	@$(INVOKE) test

test-all: ready ## the same, plus the tests that need a browser, qemu, docker (requirements/system.apt)
	@$(INVOKE) test-all

lint: ready ## run ruff and mypy
	@$(INVOKE) lint

engine: ready ## build libax_engine into board/engine/lib (ARGS='--machine aarch64 --into folder' for a board)
	@$(INVOKE) engine

page: ready ## fetch the Markdown libraries of axrun serve's page with npm into board/axrun/serve/page/lib
	@$(INVOKE) page

bench: ready ## benchmark speed and memory; PEER=llama.cpp compares with llama.cpp (ARGS='-k load' for a part)
	@$(INVOKE) bench

image: ready ## build the pinned container image; `make build` then runs in it, with the same output bytes
	@$(INVOKE) image

base-image: ready ## build the container's base from Debian packages, without an image registry
	@$(INVOKE) base-image

verify-reproducible: ready ## build image and bundle twice from scratch and compare them byte by byte
	@$(INVOKE) verify-reproducible

wheels: ready ## build the release wheels twice, compare them, and put them into OUT/wheels
	@$(INVOKE) wheels

setup: ready ## make VENV with everything that the other targets need, e.g. before going offline
	@$(INVOKE) setup

clean: ## remove out/ and the caches; keep VENV and downloaded checkpoints
	@$(if $(wildcard $(VENV)/build.installed),$(INVOKE) clean,rm -rf out)

# These targets build libax_engine in parallel with installing and type checking.
test test-all: WITHOUT = --without-engine

ready:
	@command -v "$(KEEPER)" >/dev/null || \
	{ echo "error: no $(KEEPER) here: on Debian or Ubuntu, apt-get install python3 python3-venv" >&2; exit 2; }
	@"$(KEEPER)" requirements/install.py $(WITHOUT) "$(VENV)" build

##
## MODEL=tiny-qwen2    one of models/*.toml, or a repository of the Hugging Face Hub: MODEL=owner/name
## MODEL_DIR=folder    its checkpoint, without network
## PROMPT='1+1='       the prompt                        OUT=out              the output folder
## PARALLEL=cores      layers compiled in parallel       FORCE=1              replace a different bundle
## ARGS='...'          more flags for the command        WHEELS=folder        more wheels to install from
## PYTHON=python3.12   another Python (3.11 to 3.14)     VENV=.venv           another environment
## TORCH=cpu           torch for the check: cpu, pypi (the package index's, 3 GB), or none (no check)
## PEER=llama.cpp      what `make bench` compares with   REPORT=1             update docs/benchmarks.md
## ENGINE=auto         auto, docker or local             BASE_IMAGE=image     another Debian image to build on
## BACKEND=cpu         cpu, or pulsar2 with VENDOR_IMAGE  MIRROR=address       another Debian mirror
##                     (VENDOR_SHA256, VENDOR_LICENCE)   see docs/container.md
