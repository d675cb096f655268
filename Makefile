# Two commands matter: `make demo` and `make test`. Both install what is missing into .venv first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
OUT ?= runs/demo

.PHONY: demo demo-smallest real test check bench docs demo-teacher clean

demo: $(INSTALLED)
	$(BIN)/minitron demo --out $(OUT)

# Every stage of the demo on as little text as it takes; for continuous integration.
demo-smallest: $(INSTALLED)
	$(BIN)/minitron demo --out $(OUT) --set calibrate.samples=16 --set distill.tokens=50000 \
	    --set evaluate.blocks=16 --set evaluate.new_tokens=8

# The main job on a real language model, SmolLM2-135M-Instruct, with 20 minutes of distillation on text that the model
# writes itself, to files for llama.cpp; needs 3 GB of disk.
REAL := SmolLM2-135M-Instruct.Q4_1.gguf
real: $(INSTALLED)
	$(BIN)/python benchmarks/get_models.py --only $(REAL) --out models
	$(BIN)/minitron compress models/$(REAL) --target-params 75% --data teacher --set data.max_tokens=100K \
	    --set data.heldout_fraction=0.15 --minutes 20 --set 'gguf.types=[Q8_0, Q4_K_M]' --out runs/real

# Two workers of one thread each use two cores better than one worker of two threads.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest tests/test_imports.py

bench: $(INSTALLED)
	$(BIN)/python benchmarks/streaming_memory.py
	$(BIN)/python benchmarks/chunked_loss.py

# The reference pages are generated from the code that they describe, the notebook from the tutorial.
docs: $(INSTALLED)
	$(BIN)/python docs/recipe_reference.py > docs/reference/recipe.md
	$(BIN)/python docs/cli_reference.py > docs/reference/cli.md
	$(BIN)/python docs/api_reference.py > docs/reference/api.md
	$(BIN)/python docs/notebook.py > examples/demo.ipynb

# Trains the model that ships in src/minitron/assets/demo-teacher again; about an hour on two cores.
demo-teacher: $(INSTALLED)
	$(BIN)/python benchmarks/train_demo_teacher.py --out src/minitron/assets/demo-teacher

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "minitron needs Python 3.11 or newer: make PYTHON=python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[data,dev,eval,gguf]'
	touch $@
