# Each target does all its own set-up: see tools/setup.sh.
.DEFAULT_GOAL := help
PY := .venv/bin/python
ARGS ?=
DEMO_ARGS ?=
VERSION ?=
JOBS ?=

.PHONY: help demo demo-large test test-faults test-deepspeed test-loops test-mutants optimizers-table test-torch bench docs deps lint tidy format clean

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 16

demo: ## Train a small GPT twice: AdamW in memory, AdamW on NVMe (ARGS="--help")
	@tools/setup.sh package
	@$(PY) examples/train_gpt.py $(DEMO_ARGS) $(ARGS)

demo-large: ## Train a model whose state is twice the memory it may have (minutes)
	@tools/setup.sh package
	@$(PY) examples/demo_large.py $(DEMO_ARGS) $(ARGS)

test: ## GoogleTest and pytest (ARGS go to pytest; JOBS=1: one after the other)
	@tools/setup.sh tests
	@JOBS=$(JOBS) tools/test.sh $(ARGS)

test-torch: ## Build and test with another torch (VERSION=2.15.0; the newest)
	@tools/test_torch.sh $(VERSION) $(ARGS)

test-mutants: ## Break the code in known ways; each named test must notice
	@tools/setup.sh tests
	@$(PY) tests/mutants/run.py $(ARGS)

test-faults: ## Faults of disk, kernel and caller, on every engine (minutes)
	@tools/setup.sh tests
	@TORCH_EXT_TEST_FAULTS=all tools/test.sh tests/fault $(ARGS)

test-deepspeed: ## DeepSpeed's ZeRO-3 on its own I/O and on ours (minutes: it compiles its op)
	@tools/setup.sh tests
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-build-isolation deepspeed
	@PATH="$$PWD/.venv/bin:$$PATH" $(PY) -m pytest tests/deepspeed $(ARGS)

optimizers-table: ## Which optimizer classes OffloadedOptimizer runs, for docs/optimizers.md
	@tools/setup.sh package
	@$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --target build/optimizers \
	  timm pytorch-optimizer schedulefree prodigyopt lion-pytorch torch-optimi dadaptation
	@PYTHONPATH=build/optimizers $(PY) tests/python/optimizer_classes.py --write docs/optimizers.md $(ARGS)

test-loops: ## Trainers of Hugging Face and Lightning with OffloadedAdamW (installs them)
	@tools/setup.sh tests
	@$(PY) -m pip install --quiet --disable-pip-version-check transformers accelerate lightning
	@PATH="$$PWD/.venv/bin:$$PATH" $(PY) -m pytest tests/loops $(ARGS)

bench: ## All benchmarks, a quarter of an hour; see benchmarks/README.md
	@tools/setup.sh benchmarks
	@tools/bench.sh $(ARGS)

docs: ## The pages as a site, with references, into build/docs
	@tools/setup.sh package
	@tools/docs.sh $(ARGS)

deps: ## Unpack missing Debian packages into .deps, without root
	@tools/deps.sh

lint: ## clang-format, ruff, plain English in pages and comments, locks
	@tools/setup.sh python
	@tools/lint.sh

tidy: ## clang-tidy (minutes)
	@tools/setup.sh tests
	@tools/tidy.sh $(ARGS)

format: ## Rewrite the sources as clang-format and ruff want them
	@tools/setup.sh python
	@tools/lint.sh --fix

clean: ## Remove what was built; .venv and .deps stay
	rm -rf build torch_ext/_C.*.so torch_ext/lib torch_ext/include torch_ext/share
