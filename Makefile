# The commands of the project. `make demo` and `make test` set up what is missing (as root, on Debian 12).
SHELL := /bin/sh
PORTS ?= vhost-user
FREEZE ?= switchover
BASELINE ?=
RUNS ?= 5
BENCHES ?= pvp testpmd growth hold latency idle

.PHONY: demo bench bench-moves test check audit lab clean

# A group of real VMs moves between two hosts. PORTS=vhost-user|tap FREEZE=switchover|early BASELINE=1
demo: lab
	cargo build --release -q --workspace --bins
	target/release/gangway-demo --ports $(PORTS) --freeze $(FREEZE) $(if $(BASELINE),--baseline) --out target/demo

# Many moves, by Gangway and by what it is compared with, in turn: a table of medians. RUNS=5
bench-moves: lab
	cargo build --release -q --workspace --bins
	target/release/gangway-series --runs $(RUNS) --out target/bench/moves

# The switch beside OVS-DPDK and with DPDK guests, what holds and idle ports cost, and its stages one by one: about an hour
# on two idle processors, more on busy ones. JSON, tables and pictures: target/bench. BENCHES="pvp hold" for some of it
bench:
	cargo build --release -q -p gangway-switch -p gangway-benches
	for b in $(BENCHES); do target/release/gangway-$$b || exit 1; done
	cargo bench -q -p gangway-benches --bench micro

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
	@command -v cargo-deny >/dev/null || cargo install --locked -q cargo-deny
	cargo deny -L error check bans licenses sources

# Known vulnerabilities of dependencies; needs the network
audit:
	cargo deny -L error check advisories

clean:
	cargo clean
