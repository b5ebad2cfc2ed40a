# Every target makes .venv by itself, once.
# `make demo` inserts objects into three toybox scenes; with ARGS into a picture of yours as well:
# make demo ARGS="input.image=me.png prompt.source='a view of the road' prompt.edit='a car on the road' subject=car"
PYTHON := $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
READY := .venv/.ready
ARGS ?=
# Tiny models gain nothing from threads, and on a busy machine threads wait for each other.
export OMP_NUM_THREADS ?= 1
# sam2's optional CUDA extension is not worth a compiler.
export SAM2_BUILD_CUDA ?= 0

.PHONY: demo docs docs-pictures test compose test-goldens test-fetch test-browser bench quality ablations lint clean

demo: $(READY)
	$(BIN)/inlay run demo --out outputs/demo
	$(if $(ARGS),$(BIN)/inlay run addit_paste --out outputs/demo/yours $(ARGS))

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 8 $(ARGS)

# Every pair of plugins on both models; `make test` takes a quarter of that.
compose: $(READY)
	$(BIN)/python -m pytest tests/test_compose.py -m "slow or not slow" -n auto --maxprocesses 8 $(ARGS)

test-goldens: $(READY)
	$(BIN)/python -m pytest -m goldens $(ARGS)

test-fetch: $(READY)
	$(BIN)/python -m pytest -m fetch $(ARGS)

# In the machine's Chromium, or, where there is none, in one that comes in a package of npm.
test-browser: export BROWSER ?= $(firstword $(foreach name,chromium chromium-browser google-chrome,\
	$(shell command -v $(name))) .venv/browser/chromium)
test-browser: $(READY)
	test -x $(BROWSER) || $(BIN)/python tests/fetch_browser.py .venv/browser
	$(BIN)/python -m pytest -m browser tests/test_study_browser.py $(ARGS)

bench: $(READY)
	rm -rf outputs/bench
	$(BIN)/python -m pytest benchmarks -p no:xdist -o python_files='bench_*.py' -o python_functions='bench_*' $(ARGS)
	$(BIN)/python benchmarks/report.py

quality: $(READY)
	$(BIN)/python benchmarks/quality.py $(ARGS)

# Miniatures without one part each, for the section `exemplar-ablations` of `make quality`: about an hour on one core.
ablations: $(READY)
	$(BIN)/python benchmarks/exemplar_ablations.py

docs: $(READY)
	$(BIN)/python docs/generate.py

docs-pictures: $(READY)
	$(BIN)/python docs/draw.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

clean:
	rm -rf .venv outputs dist build .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .benchmarks .hypothesis
	find core plugins tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# Rebuilt when the requirements change, and only then.
$(READY): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "inlay needs Python 3.11 or newer"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@
