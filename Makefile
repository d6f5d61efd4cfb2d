PYTHON ?= python3
VENV := .venv
CONSTRAINTS := constraints.txt
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

UPSTREAM = $(DIFFUSERS)/examples/research_projects/ncp_dpo

.PHONY: demo test test-oldest quality fix-copies upstream gpu gpu-train gpu-time gpu-precision

$(VENV)/installed: requirements.txt tools/requirements.txt $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) torch
	$(BIN)/pip install --quiet --constraint $(CONSTRAINTS) --requirement requirements.txt \
		--requirement tools/requirements.txt pytest pytest-cov pytest-xdist ruff selenium
	touch $@

demo: $(VENV)/installed
	$(BIN)/python small_world/demo.py

# Coverage of the mathematics alone: it would slow down whatever trains.
test: quality
	$(BIN)/pytest --numprocesses 2 tests/test_ncp_loss.py \
		--cov ncp_loss --cov-branch --cov-report term-missing --cov-fail-under 100
	$(BIN)/pytest --numprocesses 2 --dist loadgroup --ignore tests/test_ncp_loss.py

# The lower bounds of requirements.txt.
test-oldest:
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt

quality: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix-copies: $(VENV)/installed
	$(BIN)/python tests/test_copies.py

# With $(PYTHON) as it is. Every part ends by itself within 8 minutes; MODEL is for the last.
gpu:
	$(MAKE) --keep-going gpu-train gpu-time gpu-precision

gpu-train gpu-time gpu-precision: gpu-%:
	$(PYTHON) benchmarks/gpu.py $* $(if $(MODEL),--model $(MODEL))

# Writes the example for Diffusers into a checkout of it, and checks it by that checkout's settings.
upstream: $(VENV)/installed
	@test -f "$(DIFFUSERS)/src/diffusers/__init__.py" || \
		{ echo "DIFFUSERS=$(DIFFUSERS) is no checkout of diffusers: make upstream DIFFUSERS=<checkout>"; exit 2; }
	mkdir -p "$(UPSTREAM)/tests"
	cp train_ncp_dpo_sd15.py train_ncp_dpo_sdxl.py preference_pairs.py ncp_loss.py requirements.txt "$(UPSTREAM)"
	cp docs/upstream_README.md "$(UPSTREAM)/README.md"
	cp tests/conftest.py tests/tiny_checkpoints.py tests/tiny_unets.py tests/test_copies.py tests/test_ncp_loss.py \
		"$(UPSTREAM)/tests"
	# Names of tests are there once: its own has one of this name.
	cp tests/test_training.py "$(UPSTREAM)/tests/test_ncp_dpo_training.py"
	cd "$(DIFFUSERS)" && "$(abspath $(BIN))/ruff" check --no-cache examples/research_projects/ncp_dpo
	cd "$(DIFFUSERS)" && "$(abspath $(BIN))/ruff" format --no-cache --check examples/research_projects/ncp_dpo
