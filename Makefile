# make demo and make test are all that a fresh machine needs; both are quick the second time.

PYTHON ?= python3
BIN := .venv/bin
RIG := ../shared/tools/container
PYTEST := $(BIN)/python -m pytest
DEFAULT := --numprocesses auto --maxprocesses 8 --dist worksteal -m "not container and not gpu and not store and not slow"

.PHONY: demo test lint format container gpu store slow fuzz hunt coverage mutation audit requirements readme clean

demo: .venv/.demo ## a bucket on this machine, the job as a container runs it, the results
	$(BIN)/python -m tests.demo

test: lint ## lint, types, format and every test that takes no container and no minutes
	$(PYTEST) $(DEFAULT)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive crowdlayer entrypoint.py
	$(BIN)/hadolint Dockerfile
	$(BIN)/shellcheck .ci/run .docker/update-requirements crowdlayer/platforms/slurm/crowdlayer.sbatch

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

container: .venv/.dev ## build the image and run it against a bucket on loopback
	$(if $(wildcard $(RIG)/engine),$(RIG)/engine) $(PYTEST) -m container

gpu: .venv/.dev ## what a GPU alone can show
	$(PYTEST) -m gpu

store: .venv/.dev ## the tests against the S3-compatible store that S3_TEST_ENDPOINT and its like name
	$(PYTEST) -m store

fuzz: .venv/.dev ## a long hunt with random files, checkpoints and settings (FUZZ_EXAMPLES of each kind)
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-20000} $(PYTEST) $$(grep -l fuzzed tests/test_*.py)

hunt: .venv/.dev ## libFuzzer on what the job reads, HUNT_SECONDS for each kind (needs pip install atheris)
	for what in answers export metadata names index; do \
		$(BIN)/python -m tests.hunt $$what -max_total_time=$${HUNT_SECONDS:-600} -rss_limit_mb=4000 -timeout=20 || exit; \
	done

coverage: .venv/.dev ## which lines and branches make test reaches, processes and forks included
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(DEFAULT)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report

mutation: .venv/.dev ## how many small faults the tests find in what is read and published (MUTANTS of each module)
	$(BIN)/python -m tests.mutation --sample $${MUTANTS:-40} --json mutants.json

slow: .venv/.dev ## the tests that take minutes
	$(PYTEST) -m slow

audit: .venv/.dev ## the pinned packages and PyPI's advisories; fails too where these cannot be had
	for file in .docker/requirements*.txt; do $(BIN)/pip-audit --strict --disable-pip --require-hashes -r $$file || exit; done

requirements: ## pin the image's dependencies anew, from pyproject.toml (needs uv)
	.docker/update-requirements

readme: .venv/.dev ## write the table of settings into crowdlayer/docs/settings.md
	$(BIN)/python -m tests.test_readme

clean:
	rm -rf .venv demo .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage* mutants.json

.venv/.demo: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[demo]'
	touch $@

.venv/.dev: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/.demo
