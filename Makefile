# Every target sets itself up: a fresh machine needs Python >= 3.10 with venv, make and a network; `test` a C++ compiler too.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
DOCS   := $(VENV)/.installed-docs
TUTORIALS := $(patsubst %,docs/tutorials/%,$(notdir $(wildcard notebooks/*.ipynb)))
# One thread in each of two test processes: two threads in each is many times slower on two cores.
ONE    := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-all fuzz mutants machinery bench throughput gpu zoo lint results docs clean

demo: $(READY)
	$(BIN)/sparsetweaks demo

test: $(READY) lint
	$(ONE) $(BIN)/python -m pytest -q -n 2 -m "not slow"

test-all: $(READY) lint
	$(ONE) $(BIN)/python -m pytest -q -n 2

# 20,000 random networks through every surgery in every order, e.g. `make fuzz FUZZ="--models 500 --seed 7"`.
fuzz: $(READY)
	$(ONE) $(BIN)/python tests/properties/fuzz.py $(FUZZ)

# Break our own code on purpose, rule by rule, and demand that a named test notices.
mutants: $(READY)
	$(ONE) $(BIN)/python tests/mutants.py

machinery: $(READY)
	$(ONE) $(BIN)/python -m pytest -q tests/machinery --machinery-table benchmarks/results/machinery.csv

# Every speed against its peer; peers that no index has, and images, by path: see README, "How fast".
bench: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pyhessian
	$(ONE) $(BIN)/python benchmarks/bench.py $(BENCH)

# What the training loop costs over the bare step, and its parts over others'.
throughput: $(READY)
	$(ONE) $(BIN)/python benchmarks/throughput.py

# On a machine with a CUDA GPU: again and again until nothing is left, e.g. `make gpu GPU="results --data CIFAR"`.
gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py $(GPU)

# The sweep over other people's models, e.g. `make zoo ZOO="--family timm --filter 'resnet*'"`; it resumes.
zoo: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,zoo]"
	$(ONE) $(BIN)/python benchmarks/zoo.py $(ZOO)

results: $(READY)
	$(BIN)/python experiments/report.py

# The site, in docs/_build/html: notebooks that changed are run first, which takes minutes. A warning or a dead link fails.
docs: $(DOCS) $(TUTORIALS)
	$(ONE) $(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html
	$(BIN)/python docs/links.py docs/_build/html
	@echo "open docs/_build/html/index.html"

docs/tutorials/%.ipynb: notebooks/%.ipynb | $(DOCS)
	$(ONE) $(BIN)/jupyter nbconvert --log-level=WARN --to notebook --execute --output-dir=docs/tutorials $<

$(DOCS): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,docs]"
	touch $(DOCS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(READY): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:
	rm -rf $(VENV) demo build docs/_build docs/tutorials/*.ipynb *.egg-info
