# make train   MovieLens-100K from log to ranked candidates      make test   the tests
# make lint    ruff and mypy                                     make setup  the virtual environment alone
# make format  rewrite the code as `make lint` wants it          make clean  remove what `make train` made
# make doctor  is all here that training needs?                  make docs   the documentation, docs/_build/html

PYTHON ?= python3
VENV := $(CURDIR)/.venv
READY := $(VENV)/.ready
EXAMINED := $(VENV)/.examined
PIP := $(VENV)/bin/pip --disable-pip-version-check -qq
OUT := outputs/ml100k
# Tests have one thread each, and some start ranks of their own; a file's tests share what one process has trained.
TEST_PROCESSES ?= 2

# torch, fbgemm and torchrec move together; fbgemm has a build for CUDA machines and one for all others.
TORCH := torch==2.13.0
TORCHREC := torchrec==1.8.0
ifeq ($(shell command -v nvidia-smi 2>/dev/null),)
FBGEMM := torchrec-cpu
else
FBGEMM := torchrec-cuda
endif

export PATH := $(VENV)/bin:$(PATH)

.PHONY: setup doctor train test lint format docs clean
.DELETE_ON_ERROR:

setup: $(READY)

# torchrec's metadata asks for the CUDA build of fbgemm wherever it is installed, hence --no-deps.
$(READY): pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' \
		|| { echo "Python 3.11 or 3.12 is needed, $(PYTHON) is $$($(PYTHON) --version): make PYTHON=python3.11 ..."; exit 1; }
	@echo "setting up $(VENV) (once; some minutes, about 3 GB)"
	@test -x $(VENV)/bin/pip || $(PYTHON) -m venv $(VENV)
	@$(PIP) install "$(TORCH)"
	@$(PIP) install "$(TORCH)" -e '.[$(FBGEMM),dev]'
	@$(PIP) install --no-deps "$(TORCHREC)"
	@touch $(READY)

doctor: $(READY)
	python tools/doctor.py

# Once for each setup: a machine that lacks something says so in one line, before the first download.
$(EXAMINED): $(READY) tools/doctor.py
	python tools/doctor.py
	@touch $(EXAMINED)

train: $(OUT)/scores/_SUCCESS $(OUT)/evaluation.json
	@python tools/summary.py $(OUT)

$(OUT)/log/ml-100k/ml-100k.inter: | $(EXAMINED)
	python tools/fetch_ml100k.py $(OUT)/log

$(OUT)/dataset/manifest.json: $(OUT)/log/ml-100k/ml-100k.inter
	torchx run launch/prepare.py input=$(OUT)/log/ml-100k/ml-100k.inter output=$(OUT)/dataset

# An interrupted run goes on where it was.
$(OUT)/run/finished.json: $(OUT)/dataset/manifest.json
	torchx run launch/train.py experiment=ml100k trainer.resume=true

$(OUT)/evaluation.json: $(OUT)/run/finished.json
	torchx run launch/evaluate.py checkpoint=$(OUT)/run data.path=$(OUT)/dataset split=test output=$@

$(OUT)/artifact/manifest.json: $(OUT)/run/finished.json
	torchx run launch/export.py checkpoint=$(OUT)/run output=$(OUT)/artifact

$(OUT)/histories.parquet: $(OUT)/dataset/manifest.json
	python tools/write_histories.py $(OUT)/dataset $@ --split test

# A job that did not end goes on where it was.
$(OUT)/scores/_SUCCESS: $(OUT)/artifact/manifest.json $(OUT)/histories.parquet
	@test ! -e $(OUT)/scores/.job/begun.json || test $(OUT)/scores/.job/begun.json -nt $(OUT)/artifact/manifest.json \
		-a $(OUT)/scores/.job/begun.json -nt $(OUT)/histories.parquet || rm -rf $(OUT)/scores # of an older artifact
	torchx run launch/score.py artifact=$(OUT)/artifact input=$(OUT)/histories.parquet output=$(OUT)/scores mode=top_k top_k=100

test: $(READY)
	python -m pytest -n $(TEST_PROCESSES) --dist loadfile

lint: $(READY)
	ruff check .
	ruff format --check .
	mypy

format: $(READY)
	ruff check --fix .
	ruff format .

docs: $(READY)
	python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

clean:
	rm -rf outputs/ml100k
