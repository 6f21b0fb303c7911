# The whole of Keyward from one place. On a fresh machine `make demo` and `make test` are all there is to type.
# Assumed: Rust, Python 3.11 or newer with pip and venv, Node 20 or newer with npm, a C compiler. All else is fetched, by version and hash.

SHELL := /bin/bash
.DEFAULT_GOAL := help
# The stages share cargo's build directory and two of them want the whole machine: one after the other.
.NOTPARALLEL:

RELEASE := $(abspath $(or $(CARGO_TARGET_DIR),target))/release
WASM_TARGETS := wasm32-wasip1 wasm32-unknown-unknown

# The end-to-end programs find what they run by these names. ENVOY_BIN may name an Envoy that is already here.
WITH_BINARIES = envoy=$$(tools/fetch-envoy) && ENVOY_BIN="$$envoy" KEYWARD_BIN="$(RELEASE)/keyward" \
	SIM_BIN="$(RELEASE)/provider-sim" LOADGEN_BIN="$(RELEASE)/loadgen"
PYTHON := .venv/bin/python

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- Preparing -------------------------------------------------------------------------------------------------------

.PHONY: setup
setup: rust-targets envoy venv node-modules ## Fetch everything that building and testing need

.PHONY: prerequisites
prerequisites:
	@need() { command -v "$$1" >/dev/null || { echo "Keyward needs $$1: $$2" >&2; exit 1; }; }; \
	need cargo "install Rust with rustup"; \
	need cc "install a C compiler, such as gcc or clang (SQLite is compiled in)"; \
	need python3 "install Python 3.11 or newer with pip and venv (it fetches Envoy and runs the tests)"; \
	need node "install Node (it runs the tests that are compiled to wasm)"

.PHONY: rust-targets
rust-targets: prerequisites
	@for target in $(WASM_TARGETS); do \
		[ -d "$$(rustc --print target-libdir --target $$target)" ] && continue; \
		command -v rustup >/dev/null || { echo "This Rust has no $$target and there is no rustup to add it" >&2; exit 1; }; \
		echo "Adding the Rust target $$target"; \
		rustup target add $$target || exit 1; \
	done

.PHONY: envoy
envoy: prerequisites
	@tools/fetch-envoy >/dev/null

.PHONY: venv
venv: prerequisites
	@tools/venv >/dev/null

.PHONY: node-modules
node-modules: prerequisites
	@tools/node-modules >/dev/null

# --- Running ---------------------------------------------------------------------------------------------------------

.PHONY: build
build: rust-targets ## Build the keyward command, with the filter inside, and the test programs
	@echo "Building Keyward; the first time this takes some minutes"
	cargo build --release

.PHONY: up
up: build envoy ## Run Keyward on this machine, on loopback, with state in ./.keyward
	@$(WITH_BINARIES) exec "$(RELEASE)/keyward" up

.PHONY: demo
demo: build envoy venv ## Walk through Keyward's promises against a simulated provider
	@$(WITH_BINARIES) KEYWARD_PYTHON="$(abspath $(PYTHON))" "$(RELEASE)/keyward" demo

# --- Checking --------------------------------------------------------------------------------------------------------
# One profile for all of it, so that each crate is compiled once.

.PHONY: test
test: test-unit test-wasm test-e2e ## Run all tests: units, the core as wasm, end to end through a real Envoy

.PHONY: test-unit
test-unit: rust-targets
	@echo "Unit tests"
	cargo test --release

.PHONY: test-wasm
test-wasm: rust-targets
	@echo "The core's tests again, compiled to wasm and run by Node"
	@runner=$$(tools/wasm-bindgen-runner) && CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_RUNNER="$$runner" \
		cargo test --release -p keyward-core --target wasm32-unknown-unknown

# The filter once more, with a header that traps its VM: only tests of recovery load it.
TRAP_DIR := $(abspath $(or $(CARGO_TARGET_DIR),target))/trap
.PHONY: trap-filter
trap-filter: rust-targets
	@cargo build --quiet --profile filter -p keyward-filter --features test-trap --target wasm32-wasip1 --target-dir "$(TRAP_DIR)"

.PHONY: test-e2e
test-e2e: build trap-filter envoy venv node-modules
	@echo "End-to-end tests through a real Envoy"
	@$(WITH_BINARIES) TRAP_FILTER="$(TRAP_DIR)/wasm32-wasip1/filter/keyward_filter.wasm" $(PYTHON) -m pytest tests/e2e -q -n 2 --dist loadfile

.PHONY: bench
bench: build envoy venv ## Measure Keyward beside plain Envoy on this machine
	@$(WITH_BINARIES) $(PYTHON) tests/e2e/bench.py

.PHONY: soak
soak: build envoy venv ## Run under load for long, looking for leaks and drift
	@$(WITH_BINARIES) $(PYTHON) tests/e2e/soak_revocation.py
	@$(WITH_BINARIES) $(PYTHON) tests/e2e/soak.py

.PHONY: soak-money
soak-money: build envoy venv ## Lay every kind of demand on budgets and limits for twenty minutes; TRIALS=names for some
	@$(WITH_BINARIES) $(PYTHON) tests/e2e/soak_money.py $(TRIALS)
	@echo "A million steps of the ledger against the reference"
	KEYWARD_LEDGER_STEPS=1000000 cargo test --release -p keyward-policy-service --test store model::

.PHONY: soak-rotation
soak-rotation: build envoy venv ## Take keys of pools out in every way, at full size; TRIALS=names for some
	@$(WITH_BINARIES) $(PYTHON) tests/e2e/soak_rotation.py $(TRIALS)

# The fuzz targets are a workspace of their own. TARGETS=names for some; FUZZ_SECONDS and FUZZ_JOBS: see tools/fuzz.
.PHONY: soak-fuzz
soak-fuzz: prerequisites ## Fuzz every reader of untrusted bytes, FUZZ_SECONDS=600 each, as many at once as there are cores
	cargo clippy --manifest-path fuzz/Cargo.toml --all-targets -- -D warnings
	@tools/fuzz $(TARGETS)

.PHONY: lint
lint: rust-targets ## Check format, lints, licenses and sources; ADVISORIES=1 adds known vulnerabilities
	cargo fmt --all --check
	cargo fmt --manifest-path fuzz/Cargo.toml --check
	cargo clippy --release --all-targets -- -D warnings
	cargo clippy --release -p keyward-filter --target wasm32-wasip1 -- -D warnings
	@deny=$$(tools/cargo-deny) && for manifest in Cargo.toml fuzz/Cargo.toml; do \
		"$$deny" --manifest-path $$manifest check bans licenses sources $(if $(filter 1,$(ADVISORIES)),advisories) || exit 1; \
	done

.PHONY: fmt
fmt: ## Format the code
	cargo fmt --all
	cargo fmt --manifest-path fuzz/Cargo.toml

.PHONY: clean
clean: ## Remove what was built and fetched; the ledger in ./.keyward stays, and so do inputs that crashed a fuzz target
	cargo clean
	rm -rf .venv .tools tests/e2e/node/node_modules fuzz/target fuzz/corpus
