# Every command of the project. `make help` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
VENV ?= .venv
# What keeps the CUDA build of torch out of $(VENV); /dev/null lets it in.
CONSTRAINTS ?= tools/cpu-constraints.txt
# Further arguments of pytest or of the demo: make test ARGS="-k broadcast"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help env env-mpich env-openmpi env-horovod env-xla bench bench-mpi bench-data bench-scale demo test test-mpi \
	test-mpich test-openmpi test-horovod test-xla test-slurm check docs dist test-gpu failures \
	failures-mpich failures-openmpi soak clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z -]+:.*## / {printf "make %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(VENV)/.made ## make the environment, $(VENV), without CUDA packages

demo: env ## train a small CNN on handwritten digits with two processes
	$(VENV)/bin/python examples/digits.py --nproc_per_node 2 --min_accuracy 0.97 $(ARGS)

# Three at a time, also on two cores: most of the time tests wait. ARGS="-n 0" is one after the other, for a debugger.
test: env ## run every test that needs pip alone
	$(VENV)/bin/python -m pytest -n 3 --dist loadgroup --no-loadscope-reorder \
		-m "not gpu and not slurm and not mpi and not horovod and not xla and not matrix and not soak" $(ARGS)

check: env ## lint, format, types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

env-mpich env-openmpi: env-%: $(VENV)-%/.made ## make an environment with this MPI

env-horovod: $(VENV)-horovod/.made ## make an environment with Horovod, which is built the first time

env-xla: $(VENV)-xla/.made ## make an environment with torch_xla, on the CPU; 2.2 GB, kept in ~/.cache/idist

test-mpi: test-mpich test-openmpi ## run the tests that need a real mpiexec, with MPICH and with Open MPI

# Both environments, for either: one test starts the processes of the one with the mpiexec of the other.
test-mpich test-openmpi: test-%: env-mpich env-openmpi
	$(VENV)-$*/bin/python -m pytest -m "mpi and not matrix" tests/mpi tests/matrix tests/test_documents.py \
		tests/examples/test_readme_commands.py $(ARGS)

# With MPICH, for the checkpoints that one of them writes and the other reads.
test-horovod: env-horovod env-mpich ## run the tests that need Horovod
	$(VENV)-horovod/bin/python -m pytest -m "horovod and not matrix" tests/hvd tests/matrix tests/test_documents.py \
		tests/examples/test_readme_commands.py $(ARGS)

test-xla: env-xla ## run the tests that need torch_xla, on the CPU
	$(VENV)-xla/bin/python -m pytest -m xla tests/xla $(ARGS)

bench-mpi: env-mpich env-openmpi ## compare mpi with gloo, with MPICH and with Open MPI
	for mpi in mpich openmpi; do \
		PATH="$(CURDIR)/$(VENV)-$$mpi/bin:$$PATH" python -m idist run --mpi --nproc 2 bench/mpi.py $(ARGS) || exit 1; \
	done

bench: $(VENV)-bench/.made ## measure idist beside its peers, in turns
	$(VENV)-bench/bin/python bench/everything.py $(ARGS)

bench-scale: $(VENV)-bench/.made ## count and measure what a rank of a large job does
	$(VENV)-bench/bin/python bench/scale.py $(ARGS)

bench-data: $(VENV)-bench/.made ## measure what a shuffled order costs, beside torch and Accelerate
	$(VENV)-bench/bin/python bench/data.py $(ARGS)

test-slurm: env ## run the tests that need Slurm, on a cluster of four nodes that is started for them; as root
	tools/slurm-cluster.sh with $(VENV)/bin/python -m pytest -m "slurm and not matrix" tests/slurm \
		tests/matrix tests/examples/test_readme_commands.py $(ARGS)

# Each launcher in turn; a failed one does not keep the others from running, and the page shows what failed.
failures: export IDIST_FAILURES = $(CURDIR)/build/failures
failures: env env-horovod failures-mpich failures-openmpi ## run the whole failure matrix, an hour, and write its tables; as root
	-$(VENV)/bin/python -m pytest -m "not mpi and not horovod and not slurm" tests/matrix $(ARGS)
	-$(VENV)-horovod/bin/python -m pytest -m horovod tests/matrix $(ARGS)
	-tools/slurm-cluster.sh with $(VENV)/bin/python -m pytest -m slurm tests/matrix $(ARGS)
	PYTHONPATH=tests $(VENV)/bin/python -m matrix.table $(IDIST_FAILURES)
	$(VENV)/bin/python -m pytest -k "page" tests/matrix

failures-mpich failures-openmpi: failures-%: env-%
	-$(VENV)-$*/bin/python -m pytest -m mpi tests/matrix $(ARGS)

soak: env ## run ten thousand collectives, hundreds of contexts and a hundred runs, and see that nothing grows
	$(VENV)/bin/python -m pytest -m soak -s -o faulthandler_timeout=0 tests/test_soak.py $(ARGS)

docs: $(VENV)-docs/.made ## make the site of docs/, build/docs/index.html; a warning is an error
	$(VENV)-docs/bin/python -m sphinx --fail-on-warning --keep-going --fresh-env --quiet --jobs auto \
		-d build/doctrees docs build/docs

dist: $(VENV)-dist/.made ## make the wheel and the sdist, check both, run the README's code on the installed wheel
	rm -rf dist
	$(VENV)-dist/bin/python -m build
	$(VENV)-dist/bin/twine check --strict dist/*
	$(VENV)-dist/bin/check-wheel-contents dist/*.whl
	$(VENV)-dist/bin/pip install --quiet --force-reinstall --no-deps dist/*.whl
	$(VENV)-dist/bin/pip check
	$(VENV)-dist/bin/python tools/check_dist.py

test-gpu: ## run the tests that need a CUDA device, with the python3 and torch that are there
	PYTHONPATH=$(CURDIR)/src python3 -m pytest -m gpu tests/gpu tests/auto/test_samplers.py tests/cli/test_check.py $(ARGS)

clean: ## remove the environment and what the tools left
	rm -rf $(VENV) $(VENV)-mpich $(VENV)-openmpi $(VENV)-horovod $(VENV)-xla $(VENV)-bench $(VENV)-docs \
		$(VENV)-dist
	rm -rf build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache digits.png
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.made: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(VENV)
	$(VENV)/bin/pip install --constraint $(CONSTRAINTS) "$(TORCH)" --editable ".[dev]" \
		|| { echo "$(VENV) is not made. Was it the CUDA build of torch? $(CONSTRAINTS) says what to do." >&2; exit 1; }
	touch $@

$(VENV)-bench/.made $(VENV)-docs/.made: $(VENV)-%/.made: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --constraint $(CONSTRAINTS) "$(TORCH)" --editable ".[$*]" \
		|| { echo "$(@D) is not made. Was it the CUDA build of torch? $(CONSTRAINTS) says what to do." >&2; exit 1; }
	touch $@

# Nothing of idist: the wheel comes when it is built.
$(VENV)-dist/.made: $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --constraint $(CONSTRAINTS) "$(TORCH)" "build>=1.6.1" "check-wheel-contents>=0.6.3" "twine>=7" \
		|| { echo "$(@D) is not made. Was it the CUDA build of torch? $(CONSTRAINTS) says what to do." >&2; exit 1; }
	touch $@

$(VENV)-%/.made: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --constraint $(CONSTRAINTS) "$(TORCH)" --editable ".[mpi,test]" $* \
		|| { echo "$(@D) is not made. Was it the CUDA build of torch? $(CONSTRAINTS) says what to do." >&2; exit 1; }
	touch $@

$(VENV)-horovod/.made: pyproject.toml $(CONSTRAINTS) tools/horovod-wheel.sh
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --constraint $(CONSTRAINTS) "$(TORCH)" --editable ".[test]" \
		|| { echo "$(@D) is not made. Was it the CUDA build of torch? $(CONSTRAINTS) says what to do." >&2; exit 1; }
	wheel=$$(PYTHON=$(@D)/bin/python tools/horovod-wheel.sh) && $(@D)/bin/pip install "$$wheel"
	touch $@

# torch here is one that pip must not complete: its needs are gigabytes of CUDA libraries.
$(VENV)-xla/.made: pyproject.toml tools/xla-packages.sh
	$(PYTHON) -m venv --clear $(@D)
	$(@D)/bin/pip install --no-deps --editable .
	$(@D)/bin/pip install $$($(@D)/bin/python -c "from importlib.metadata import requires; \
		print(*(need.partition(';')[0] for need in requires('idist') if need.endswith(\"extra == 'test'\")))")
	folder=$$(PYTHON=$(@D)/bin/python tools/xla-packages.sh) \
		&& echo "$$folder" > "$$($(@D)/bin/python -c 'import site; print(*site.getsitepackages())')/xla.pth"
	touch $@
