# make            lists the targets
# make demo       needs Python 3.11 or newer with pip, and nothing else
#
# The environment lies in .venv and is made by the first target that needs it. Its stamp carries a checksum of
# pyproject.toml, constraints.txt and this folder's path: as long as they stay the same, nothing is installed and no
# network is needed.

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
MILVUS_STAMP := .venv-milvus/ready-2.3.5
MARK := .venv/half-made
STAMP := .venv/ready-$(shell { pwd; cat pyproject.toml constraints.txt; } | cksum | cut -d' ' -f1)
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PIP_INSTALL := -m pip install -qq --no-input --disable-pip-version-check -c constraints.txt -e '.[dev]'
# pip builds the package in an environment of its own and takes the versions for it from these.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.PHONY: help demo test test-milvus lint bench environment

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo 'PYTHON=... names the Python that .venv is made with; ARGS=... is handed on: make test ARGS="-k rules".'

demo: environment ## permuted digits in under a minute: a table and a figure
	@$(BIN)/python -m recollect demo $(ARGS)

test: environment ## all tests
	@$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

# The server listens on every interface it finds: it is given a network that has none but the loopback.
test-milvus: environment $(MILVUS_STAMP) ## the memory in Milvus on a real server, which it installs, in four minutes
	@unshare --net --map-root-user true || { \
		echo 'The server needs a network of its own: Linux with unshare (util-linux) that may make user namespaces.' >&2; \
		exit 1; }
	@RECOLLECT_MILVUS="$$PWD/.venv-milvus/bin/python" \
		unshare --net --map-root-user $(BIN)/python -m pytest tests/servers $(ARGS)

lint: environment ## ruff and pyright
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m pyright

bench: environment ## what each part costs beside what others do, in about seven minutes
	@$(BIN)/python -m benchmarks $(ARGS)

environment: $(STAMP) ## make .venv, or bring it up to date
	@:

# A stamp means nothing once the Python behind it is gone.
ifneq ($(shell $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null && echo works),works)
.PHONY: $(STAMP)
endif

# A .venv whose installation was killed carries a mark and is made anew. One that is out of date is updated, and stays
# as it was if that fails. Where Python comes without ensurepip (Debian splits it off), its pip installs from outside.
$(STAMP):
	@command -v '$(PYTHON)' >/dev/null || { \
		echo 'There is no $(PYTHON). Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python' >&2; exit 1; }
	@'$(PYTHON)' -c '$(NEW_ENOUGH)' || { \
		echo "recollect needs Python 3.11 or newer, but $(PYTHON) is $$('$(PYTHON)' -V 2>&1)." \
			'Name a newer one: make PYTHON=python3.12' >&2; exit 1; }
	@echo 'Preparing the environment in .venv (a few minutes the first time) ...'
	@rm -f .venv/ready-*
	@if [ -e $(MARK) ] || ! $(BIN)/python -c '$(NEW_ENOUGH)' 2>/dev/null; then \
		rm -rf .venv; \
		'$(PYTHON)' -m venv .venv >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear --without-pip .venv; \
	fi
	@touch $(MARK)
	@trap 'exit 130' INT; if $(BIN)/python -m pip --version >/dev/null 2>&1; then $(BIN)/python $(PIP_INSTALL); \
	else '$(PYTHON)' -m pip --python $(BIN)/python $(subst -m pip,,$(PIP_INSTALL)); fi || { rm $(MARK); \
		echo 'The installation failed; the lines above say why. Once that is mended, run make again.' >&2; exit 1; }
	@rm $(MARK)
	@touch $@

# The last Milvus server that came as a package, and what it needs of an older setuptools, in an environment of its own.
$(MILVUS_STAMP):
	@echo 'Preparing a Milvus server in .venv-milvus ...'
	@rm -rf .venv-milvus
	@'$(PYTHON)' -m venv .venv-milvus >/dev/null 2>&1 || '$(PYTHON)' -m venv --clear --without-pip .venv-milvus
	@if .venv-milvus/bin/python -m pip --version >/dev/null 2>&1; then pip='.venv-milvus/bin/python -m pip'; \
	else pip="'$(PYTHON)' -m pip --python .venv-milvus/bin/python"; fi; \
	eval "$$pip" install -qq --no-input --disable-pip-version-check milvus==2.3.5 setuptools==80.10.2
	@touch $@
