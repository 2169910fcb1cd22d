# The commands of the project. `make demo` and `make test` set up what is missing (as root, on Debian 12).
SHELL := /bin/sh
PORTS ?= vhost-user
FREEZE ?= switchover
BASELINE ?=

.PHONY: demo test check lab clean

# A group of real VMs moves between two hosts. PORTS=vhost-user|tap FREEZE=switchover|early BASELINE=1
demo: lab
	cargo build --release -q --workspace --bins
	target/release/gangway-demo --ports $(PORTS) --freeze $(FREEZE) $(if $(BASELINE),--baseline) --out target/demo

# What the lab needs: packages, guest image
lab:
	@sh deploy/lab/setup.sh
	@sh deploy/lab/image.sh

# All tests: units, and the lab with real VMs. One build serves both
test: lab
	cargo build -q --workspace --bins
	cargo test -q --workspace --exclude gangway-tests
	cargo test -q -p gangway-tests -- --test-threads=1

# What a commit must pass
check:
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc -q --workspace --no-deps
	@if command -v cargo-deny >/dev/null; then cargo deny -L error check; else echo "check: cargo-deny is not installed, skipped (cargo install cargo-deny)"; fi

clean:
	cargo clean
