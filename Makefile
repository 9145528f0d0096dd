# Two commands matter: `make demo` measures the default entries, `make test` runs the tests. Both install what they
# need into .venv on first use, and need no network after that.
#
#   make demo ARGS="--limit 2"                    pass anything on to `safemed-bench run`
#   make demo PYTHON=python3.12                   another interpreter (3.11 or newer)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
SUITE ?= suites/omnimed_pgd.yaml
ARGS ?=

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
ENTRIES := base sft instruct cot warm safemed-r1 safemed-r1-smooth
STAGES := base sft instruct cot warm safemed_r1 safemed_r1_smooth
CONTROLS := at_sft grpo safemed_r1_instruct
ZOO := safemed_bench/models/zoo

# One thread per process: two processes of one thread each are faster than one of two threads.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo install test test-slow lint entries controls clean
.DEFAULT_GOAL := demo

demo: $(INSTALLED)
	@$(BIN)/safemed-bench run $(SUITE) $(ARGS)

install: $(INSTALLED)
	@:

# Only when a dependency may have changed; the package itself is installed editable.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; name another one with PYTHON=...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once; some minutes on a slow line)" >&2
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch==2.13.0
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e ".[test]"
	@touch $@

test: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not slow"

test-slow: $(INSTALLED)
	@$(BIN)/python -m pytest -q -n $(JOBS) -m slow

lint: $(INSTALLED)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Trains the default entries again and puts them into the package. Resumes where it was stopped; some hours on one core.
# The three that start from `base` can also be trained side by side.
entries: $(INSTALLED)
	@set -e; for name in $(STAGES); do $(BIN)/safemed-bench train suites/train/$$name.yaml; done
	@set -e; for name in $(ENTRIES); do rm -rf $(ZOO)/$$name; cp -r runs/$$name/entry $(ZOO)/$$name; done

# The controls that suites/omnimed_ablation.yaml measures beside them; after `make entries`, whose starts they share.
controls: $(INSTALLED)
	@set -e; for name in $(CONTROLS); do $(BIN)/safemed-bench train suites/train/$$name.yaml; done

# Caches and builds; keeps .venv, runs/ and reports/.
clean:
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find safemed_bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f $(INSTALLED)
