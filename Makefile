# Each target installs what it needs (scripts/setup.sh), and says so. Root, Debian 12.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

RUN := build/venv-run/bin/python
DEV := build/venv-dev/bin/python
export PYTHONPATH := $(CURDIR)/operator:$(CURDIR)/agent:$(CURDIR)/runtime:$(CURDIR)/tests/testbed:$(CURDIR)/tests/net
export PYTHONDONTWRITEBYTECODE := 1
PYTEST = $(DEV) -m pytest --junitxml=build/junit/$@.xml

GPU_PYTEST := -c /dev/null --rootdir=. --confcutdir=tests/gpu --import-mode=importlib -p no:cacheprovider -rs

SETUP_DEMO := run build bpf net
SETUP_TEST := dev build bpf net
DEMO := $(RUN) -m midstream_testbed.demo
ifdef NOTICE
$(if $(filter-out spot,$(NOTICE)),$(error NOTICE=$(NOTICE): there is NOTICE=spot))
# with the operator, a control plane and SQS: what tests need, the Kubernetes binaries too
SETUP_DEMO := $(SETUP_TEST)
DEMO := $(DEV) -m midstream_testbed.spot
demo: kube
endif
PRODUCT := operator/midstream_cli operator/midstream_operator agent/midstream_agent runtime/midstream_runtime tests/testbed/midstream_testbed
TEST_FOLDERS := unit unit/engine unit/gateway unit/handoff unit/kv unit/vllm unit/operator unit/spot contract bpf csrc net cluster e2e vllm gpu bench
C_FILES := csrc/src/*.[ch] csrc/include/*.h csrc/fuzz/*.c bpf/*.[ch] tests/bench/*.c

.PHONY: help demo build kube images test lint bench clean-testbed proto setup-demo setup-test wheel \
	test-unit test-contract test-csrc test-bpf test-net test-cluster test-e2e test-vllm test-gpu

help: ## What there is
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  make demo STREAMS=200          with 200 clients"
	@echo "  make demo DEMO_MOVE_SECONDS=3  with a cloud that takes 3 s to move the address"
	@echo "  make demo NOTICE=spot          EC2 takes the source back and nobody calls; builds Kubernetes once"
	@echo "  make test LONG=1               with the long matrices (hours)"

demo: setup-demo build ## A live stream changes nodes; report on the screen and in build/demo.json
	@$(DEMO)

build: ## The C library, under build/csrc
	@scripts/setup.sh build
	@$(MAKE) -s -C csrc

kube: ## The Kubernetes binaries of the tests, from their Go modules (5 minutes once)
	@scripts/kube.sh

images: ## The container images, without a registry (4 minutes once)
	@scripts/images.sh

setup-demo:
	@scripts/setup.sh $(SETUP_DEMO)

setup-test:
	@scripts/setup.sh $(SETUP_TEST)

test: ## All tests, each kind under its own time limit
	@scripts/parts.sh test

test-unit: setup-test build ## Without root's powers: pieces of the product
	@scripts/setup.sh model
	$(PYTEST) tests/unit

test-contract: setup-test build ## Pairs that must agree: stubs, layouts, names, documents
	$(PYTEST) tests/contract

test-csrc: setup-test build ## The C library on real sockets; sanitizers, fuzzing
	@scripts/setup.sh sanitize inspect
	$(PYTEST) tests/csrc

test-bpf: setup-test build ## The BPF programs in the kernel
	@scripts/setup.sh inspect
	$(PYTEST) tests/bpf

test-net: setup-test build ## Whole migrations on the testbed
	@scripts/setup.sh clients model
	$(PYTEST) tests/net

test-cluster: setup-test build kube ## On a Kubernetes control plane
	$(PYTEST) tests/cluster

test-e2e: setup-test build kube images ## The demo and its controls; real nodes, our images, the chart
	@scripts/setup.sh nodes
	$(PYTEST) tests/e2e

test-vllm: setup-test build kube ## With a stock vLLM on the CPU (6 GB, the first time)
	@scripts/setup.sh vllm
	$(PYTEST) tests/vllm

test-gpu: $(if $(GPU_PYTHON),,setup-test) ## KV between GPU and pool; GPU_PYTHON=python3: one with torch, transformers, pytest
	$(if $(GPU_PYTHON),PYTHONPATH=runtime $(GPU_PYTHON) -m pytest $(GPU_PYTEST),$(PYTEST)) tests/gpu

bench: setup-test build kube ## All benchmarks; figures beside their goals, JSON under build/bench
	@scripts/setup.sh inspect
	@scripts/parts.sh bench

lint: ## ruff, mypy --strict, import-linter, clang-format, helm lint
	@scripts/setup.sh dev lint
	$(DEV) -m ruff check
	$(DEV) -m mypy $(PRODUCT) examples
	@for folder in $(TEST_FOLDERS); do $(DEV) -m mypy tests/$$folder/*.py || exit 1; done
	build/venv-dev/bin/lint-imports --no-cache
	@scripts/kube.sh helm
	@for values in tests/cluster/values/*.yaml; do build/kube/helm lint --strict --quiet charts/midstream -f $$values || exit 1; done
	clang-format --dry-run -Werror $(C_FILES)

proto: ## Generate the gRPC stubs again
	@scripts/setup.sh dev
	cd agent && ../$(DEV) -m grpc_tools.protoc -I . \
	  --plugin=protoc-gen-mypy=../build/venv-dev/bin/protoc-gen-mypy \
	  --plugin=protoc-gen-mypy_grpc=../build/venv-dev/bin/protoc-gen-mypy_grpc \
	  --python_out=. --mypy_out=. --grpc_python_out=. --mypy_grpc_out=. midstream_agent/contract/agent.proto

clean-testbed: ## Remove what a crashed test or demo left on this machine
	@scripts/setup.sh run net
	$(RUN) -m midstream_testbed clean
