# Everything a newcomer needs: `make demo` and `make test`. Both install into .venv first.
.PHONY: audit coverage docs release lock sbom demo test test-fast test-slow test-long attack check stubs conformance bench-peers bench-real-cpu install clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH := torch==2.13.0
# A test process a core, four at most: each holds models of its own.
PARALLEL := --numprocesses logical --maxprocesses 4 --dist worksteal

demo: $(VENV)/.installed
	@$(BIN)/python -m examples.demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL)

# The inner loop: of these files those in which no model is made or loaded, no engine is built and no other process starts.
INNER := tests/server/test_*.py tests/server/planning/test_*.py tests/benchmarks/traffic/test_*.py tests/test_*.py
HEAVY := (from|import) (tiny|recipes|torch|diffusers)|load_base|load_fused|build_engine|distill\(|tiny_base|flash_lora|(student|teacher)_bundle|start_server|subprocess|Process\(
test-fast: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -k "not bad_input and not does_not_read" $$(grep -LE '$(HEAVY)' $(INNER))

# What `make test` leaves out, because it builds many engines or trains for a while; CI runs both.
test-slow: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -rs -m "slow and not gpu"

# Builds of further backends and families, half an hour and more; not in CI, run it before a release and after a change of engines.
test-long: $(VENV)/.installed
	$(BIN)/python -m pytest $(PARALLEL) -rs -m "long and not gpu"

# The lines and branches that `make test` runs, those of the processes it starts included; the folders behind the links count too.
COVERED ?= tests
coverage: $(VENV)/.installed
	@mkdir -p build/coverage
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest $(COVERED)
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report
	$(BIN)/coverage html --quiet -d build/coverage/html

# The attacks of tests/attack at twenty times their scale.
attack: $(VENV)/.installed
	ATTACK_SCALE=20 $(BIN)/python -m pytest tests/attack -m "not gpu" --timeout=1800

# What CI runs in addition to the tests: style, types, and a check that the generated stubs are current.
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PYTHON=$(BIN)/python proto/generate.sh
	git diff --exit-code --stat -- proto
	$(MAKE) docs

# The documentation as a site, in build/site; a link or an anchor that leads nowhere fails. Ten seconds.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

stubs: $(VENV)/.installed
	PYTHON=$(BIN)/python proto/generate.sh

# The same requests to real Triton and to the server. Triton comes in nvidia-pytriton, which needs the distribution's own Python and numpy 1.
ORACLE_PYTHON ?= /usr/bin/python3
ORACLE := .venv-oracle
conformance: $(VENV)/.installed $(ORACLE)/.installed
	$(BIN)/python tests/conformance/compare.py $(ORACLE)/bin/python

$(ORACLE)/.installed:
	@$(ORACLE_PYTHON) -m venv $(ORACLE)
	@$(ORACLE)/bin/pip install -qq nvidia-pytriton==0.7.0 'numpy<2'
	@touch $@

# The same bundle behind flashdiff, LitServe and Triton, the same arrivals; each peer in an environment of its own. Twelve minutes.
BUNDLE ?= demo/student
LITSERVE := .venv-litserve
PYTRITON := .venv-pytriton
BUNDLE_NEEDS := openvino==2026.4.1 tokenizers pydantic pillow fpng==0.1.0
bench-peers: $(VENV)/.installed $(LITSERVE)/.installed $(PYTRITON)/.installed $(BUNDLE)
	$(BIN)/python benchmarks/peers/compare.py $(BUNDLE) --litserve $(LITSERVE)/bin/python --pytriton $(PYTRITON)/bin/python --json peers.json

# SD1.5 at real size on this CPU: flashdiff, OpenVINO GenAI in an environment of its own, stock diffusers. Half an hour, 16 GiB.
GENAI := .venv-genai
PRECISION ?= fp32
bench-real-cpu: $(VENV)/.installed $(GENAI)/.installed
	$(BIN)/python benchmarks/peers/real_cpu.py --genai $(GENAI)/bin/python --precision $(PRECISION) --json real-cpu-$(PRECISION).json

$(GENAI)/.installed:
	@$(PYTHON) -m venv $(GENAI)
	@# Where the index of CPU builds cannot be reached, pip takes CUDA's, 6 GB in all.
	@-$(GENAI)/bin/pip install -qq --index-url https://download.pytorch.org/whl/cpu torch torchvision
	@$(GENAI)/bin/pip install -qq openvino-genai==2026.4.1.0 'optimum-intel[openvino]==2.2.0' diffusers==0.39.0 pillow
	@touch $@

# Ray Serve and flashdiff, for tests/deploy/test_ray_serve.py and to try deploy/ray/serve.yaml.
RAY := .venv-ray
$(RAY)/.installed: pyproject.toml
	@$(PYTHON) -m venv $(RAY)
	@$(RAY)/bin/pip install -qq -e '.[ray]' ray==2.60.0 openvino==2026.4.1
	@touch $@

demo/student:
	@$(MAKE) demo

$(LITSERVE)/.installed:
	@$(PYTHON) -m venv $(LITSERVE)
	@$(LITSERVE)/bin/pip install -qq litserve==0.2.19 numpy $(BUNDLE_NEEDS)
	@touch $@

$(PYTRITON)/.installed:
	@$(ORACLE_PYTHON) -m venv $(PYTRITON)
	@$(PYTRITON)/bin/pip install -qq nvidia-pytriton==0.7.0 'numpy<2' $(BUNDLE_NEEDS)
	@touch $@

install: $(VENV)/.installed

# Without an NVIDIA GPU torch's CPU build goes in first: left to itself, pip fetches gigabytes of CUDA libraries.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flashdiff needs Python 3.11 or newer")'
	@echo "Installing into $(VENV): about 2 GB and a minute or two"
	@$(PYTHON) -m venv $(VENV)
	@command -v nvidia-smi >/dev/null || $(BIN)/pip install -qq "$(TORCH)+cpu" 2>/dev/null \
	  || $(BIN)/pip install -qq --index-url https://download.pytorch.org/whl/cpu $(TORCH)
	@$(BIN)/pip install -qq -c constraints.txt -e '.[dev]'
	@$(BIN)/pip install -qq --no-deps clean-fid==0.1.35  # its torchvision is not needed here, and would bring CUDA
	@touch $@

clean:
	rm -rf $(VENV) $(ORACLE) $(LITSERVE) $(PYTRITON) $(GENAI) $(RAY) demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# What a serving machine installs, with hashes, for the Dockerfile and the audit. Run it when dependencies or constraints change.
lock: $(VENV)/.installed
	$(BIN)/pip install -q uv==0.13.9
	echo '# What a serving machine needs, extras http and cpu, with hashes; written by `make lock`.' > requirements.lock
	$(BIN)/uv pip compile pyproject.toml --extra http --extra cpu -c constraints.txt --universal --python-version 3.11 \
	  --generate-hashes --no-header --no-annotate -q >> requirements.lock

# Known vulnerabilities of what is installed; queries the advisory service of PyPI, so it needs the network.
audit: $(VENV)/.installed
	$(BIN)/pip install -q pip-audit==2.10.1
	$(BIN)/pip-audit --require-hashes --disable-pip -r requirements.lock
	$(BIN)/pip-audit --skip-editable

# The wheel and the source distribution of a release, in dist/; refused unless version, changelog and checkout agree.
release: $(VENV)/.installed
	$(BIN)/python deploy/release.py

# A software bill of materials of the environment that the tests run in, for a release.
sbom: $(VENV)/.installed
	$(BIN)/pip install -q cyclonedx-bom==7.5.0
	$(BIN)/cyclonedx-py environment --output-reproducible --pyproject pyproject.toml -o sbom.json $(BIN)/python
