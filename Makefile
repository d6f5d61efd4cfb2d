PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo test quality fix-copies

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --requirement requirements.txt \
		gradio matplotlib pytest pytest-cov pytest-xdist ruff selenium
	touch $@

demo: .venv/installed
	$(BIN)/python small_world/demo.py

# Coverage of the mathematics alone: it would slow down whatever trains.
test: quality
	$(BIN)/pytest --numprocesses 2 tests/test_ncp_loss.py \
		--cov ncp_loss --cov-branch --cov-report term-missing --cov-fail-under 100
	$(BIN)/pytest --numprocesses 2 --dist loadgroup --ignore tests/test_ncp_loss.py

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix-copies: .venv/installed
	$(BIN)/python tests/test_copies.py
