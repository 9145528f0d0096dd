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
VARIANTS := r1-adversarial=stages.0.grpo.rollouts=adversarial r1-clean=stages.0.grpo.rollouts=clean \
  r1-answer-ce=stages.0.adversary.objective=answer_ce r1-advantage=stages.0.adversary.objective=advantage \
  r1-no-think=stages.0.adversary.objective=no_think r1-feature=stages.0.adversary.objective=feature \
  r1-blind=stages.0.grpo.blind_penalty=0.5 r1-consistency=stages.0.grpo.consistency=0.5
SEEDS := 1 2
ZOO := safemed_bench/models/zoo

# One thread per process: two processes of one thread each are faster than one of two threads.
export OMP_NUM_THREADS ?= 1
export HF_HUB_OFFLINE ?= 1

.PHONY: demo install test test-slow lint entries controls seeds clean
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

# The controls that suites/omnimed_ablation.yaml measures, and safemed-r1 with one setting of AT-GRPO changed at a time;
# after `make entries`, whose starts they share.
controls: $(INSTALLED)
	@set -e; for name in $(CONTROLS); do $(BIN)/safemed-bench train suites/train/$$name.yaml; done
	@set -e; for one in $(VARIANTS); do \
	  $(BIN)/safemed-bench train suites/train/safemed_r1.yaml --set name=$${one%%=*} --set $${one#*=}; done

# The further training seeds that suites/omnimed_seeds.yaml measures, all from the one base.
seeds: $(INSTALLED)
	@set -e; for seed in $(SEEDS); do \
	  for name in sft warm; do \
	    $(BIN)/safemed-bench train suites/train/$$name.yaml --set seed=$$seed --set name=$$name-s$$seed; done; \
	  $(BIN)/safemed-bench train suites/train/at_sft.yaml --set seed=$$seed --set name=at-sft-s$$seed \
	    --set init=runs/warm-s$$seed/entry; \
	  $(BIN)/safemed-bench train suites/train/safemed_r1.yaml --set seed=$$seed --set name=safemed-r1-s$$seed \
	    --set init=runs/warm-s$$seed/entry; done

# Caches and builds; keeps .venv, runs/ and reports/.
clean:
	@rm -rf build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	@find safemed_bench tests -name __pycache__ -type d -prune -exec rm -rf {} +
	@rm -f $(INSTALLED)
