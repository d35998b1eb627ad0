# kvmtool: `make` lists the targets; every target sets up what it needs.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
FORMS := macho-core,elf,elf-paging,kdump-zlib,makedumpfile,makedumpfile-zlib,makedumpfile-lzo,raw,lime,gdb,mount

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## make the virtualenv in .venv
$(STAMP): pyproject.toml tools/venv.sh
	@sh tools/venv.sh $(VENV)
	@echo "installing what is needed into $(VENV): about a minute" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --config-settings editable_mode=compat -e '.[dev]'
	@touch $@

demo: $(STAMP) ## run nlist, read and procs on the embedded sample
	@sh tools/demo.sh $(BIN)/kvmtool demo

test: $(STAMP) ## run all tests
	@$(BIN)/python -m pytest

coverage: $(STAMP) ## run all tests, and hold how much of kvmtool/xnu they run against 95 %
	@$(BIN)/python -m coverage run -m pytest
	@$(BIN)/python -m coverage report --fail-under 95

check: $(STAMP) ## lint, types, dead code, duplicates, layers, sizes, generated documents
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --strict kvmtool
	@$(BIN)/python tools/dead_code.py
	@$(BIN)/pylint --disable=all --enable=duplicate-code --score=n kvmtool tools bench
	@$(BIN)/python -m pytest tests/test_layering.py tests/test_sizes.py
	@$(BIN)/python tools/docs.py --check

docs: $(STAMP) ## write the generated documents
	@$(BIN)/python tools/docs.py

site: $(STAMP) ## build the documents as a site in build/site; a warning is an error
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going docs build/site
	@echo build/site/index.html

man: $(STAMP) ## write the manual pages to build/man
	@$(BIN)/python tools/man.py build/man | wc -l

package: $(STAMP) ## build wheel and sdist in dist, check them, try them on every Python here
	@rm -rf dist
	@$(BIN)/python -m build --quiet --outdir dist
	@$(BIN)/python -m twine check --strict dist/*
	@KVMTOOL_PYTHONS=all $(BIN)/python -m pytest tests/test_packaging.py

layouts: $(STAMP) ## compile the layout database from ../shared/data/layouts
	@$(BIN)/python tools/build_layouts.py
	@$(BIN)/python tools/build_layout_types.py

sample: $(STAMP) ## build the embedded sample
	@$(BIN)/python tools/build_sample.py

bench: $(STAMP) ## measure against the peers, and write docs/benchmarks.md
	@$(BIN)/python -m bench

fuzz: $(STAMP) ## damaged input for every parser, FUZZ_SECONDS (600) each
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris || echo "no atheris for this Python: mutations are not guided"
	@PYTHONPATH=.:tests $(BIN)/python -m tests.fuzz $(TARGETS)

machine: $(STAMP) ## boot a kernel of our own under QEMU, dump it in every form, check them
	@$(BIN)/python -m tests.machine --forms $(FORMS)

peers: $(STAMP) ## compare with Volatility 3 (processes, files, sockets) and pyaff4 (volumes)
	@$(BIN)/python tools/peers.py
	@$(BIN)/python tools/peers_maps.py
	@$(BIN)/python tools/peers_net.py
	@$(BIN)/python tools/peers_aff4.py

clean: ## remove the virtualenv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache demo

.PHONY: help venv demo test coverage check docs site man package layouts sample bench fuzz machine peers clean
.DEFAULT_GOAL := help
