# The usual ways in; each sets up what it needs first (tools/setup.sh) and does nothing twice. CMake alone works as well:
# cmake --preset release && cmake --build build
#
#   make                 build/bin/vernier and the library        make asan           tests under the sanitizers, without CUDA
#   make demo            quantize a real model, end to end        make format         format all sources
#   make test            build everything, run all tests          make check-format   check the format only
#   make bench           build the benchmarks into build/bench    make install        PREFIX=/usr/local
#   make clean
#
# VERNIER_CUDA=OFF leaves out the CUDA parts, VERNIER_TORCH_ROOT=DIR (or CMAKE_PREFIX_PATH) names a LibTorch of your own,
# JOBS=N sets how many compilations run at once.

PREFIX ?= /usr/local
VERNIER_CUDA ?= AUTO
JOBS ?= $(shell tools/jobs.sh)
export VERNIER_CUDA VERNIER_TORCH_ROOT

# The CMake that set-up installed, where it did: looked up when a recipe starts, after its set-up.
CMAKE = $(shell ls -d .deps/venv/lib/python3*/site-packages/cmake/data/bin/cmake 2>/dev/null || echo cmake)
CTEST = $(patsubst %cmake,%ctest,$(CMAKE))
FLAGS = -DVERNIER_CUDA=$(VERNIER_CUDA) $(if $(VERNIER_TORCH_ROOT),-DVERNIER_TORCH_ROOT=$(VERNIER_TORCH_ROOT))

.PHONY: build demo test bench asan format check-format install clean setup-build setup-demo setup-test setup-bench
.DEFAULT_GOAL := build

# Make expands a whole recipe before it runs the first line, hence targets of their own.
setup-build setup-demo setup-test setup-bench:
	@tools/setup.sh $(@:setup-%=%)

build: setup-build
	@$(CMAKE) --preset release $(FLAGS)
	@$(CMAKE) --build build --target vernier_cli --parallel $(JOBS)

demo: setup-demo
	@$(CMAKE) --preset release $(FLAGS)
	@$(CMAKE) --build build --target vernier_cli --parallel $(JOBS)
	@.deps/venv/bin/python tools/demo.py

test: setup-test
	@$(CMAKE) --preset release $(FLAGS)
	@$(CMAKE) --build build --parallel $(JOBS)
	@$(CTEST) --preset release --parallel $(JOBS)

bench: setup-bench
	@$(CMAKE) --preset release $(FLAGS) -DVERNIER_BENCH=ON
	@$(CMAKE) --build build --parallel $(JOBS)

asan: setup-test
	@$(CMAKE) --preset asan $(FLAGS) -DVERNIER_CUDA=OFF
	@$(CMAKE) --build build-asan --parallel $(JOBS)
	@$(CTEST) --preset asan --parallel $(JOBS)

format:
	@tools/check_format.sh --fix

check-format:
	@tools/check_format.sh || [ $$? = 77 ]

install: build
	@$(CMAKE) --install build --prefix "$(PREFIX)"

clean:
	rm -rf build build-asan build-cpu
