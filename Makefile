# Each target sets up all it needs, on a machine with Python 3.11 or later and nothing else; warm, that costs
# nothing. The Docker engine and the images come from tests/testbed/provision.sh.

PYTHON ?= python3
bin := .venv/bin

.PHONY: demo test bench lint
demo: .venv/.installed
	-tests/testbed/provision.sh
	$(bin)/backupd demo

test: .venv/.installed
	tests/testbed/provision.sh
	tests/testbed/provision.sh compose postgres:13 postgres:14 postgres:15 postgres:17 postgres:18
	$(bin)/pytest -n 4 --dist loadfile --no-loadscope-reorder

bench: .venv/.installed
	tests/testbed/provision.sh
	tests/testbed/provision.sh postgres:15
	$(bin)/python -m benchmarks

lint: .venv/.installed
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports

# Debian keeps venv in a package of its own
.venv/.installed: pyproject.toml
	$(PYTHON) -m venv .venv || { apt-get -qq update && apt-get install -qq -y python3-venv && $(PYTHON) -m venv .venv; }
	$(bin)/pip install -q -e '.[dev]'
	touch $@
