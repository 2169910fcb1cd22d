# The commands of the project. `make demo` and `make test` set up what is missing (as root, on Debian 12).
SHELL := /bin/sh
PORTS ?= vhost-user
FREEZE ?= switchover
BASELINE ?=
RUNS ?= 5
CASE ?=
BENCHES ?= bound pvp testpmd growth hold ship latency idle

FUZZ ?= vhost_user keeper split_ring packed_ring packet codec shipment session spool_scan spool_open record positions backlog ledger fdb config qmp
FUZZ_S ?= 120
SEEDS ?= 100000
MINUTES ?= 30
# As cargo-fuzz builds: libFuzzer's counters in all of it, and AddressSanitizer.
FUZZ_FLAGS := --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
	-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
	-Cllvm-args=-sanitizer-coverage-trace-compares -Cdebug-assertions -Coverflow-checks -Zsanitizer=address
FUZZ_HOST = $(shell rustc -vV | sed -n 's/^host: //p')

.PHONY: demo bench bench-moves chaos test soak soak-moves check fuzz audit lab clean

# A group of real VMs moves between two hosts. PORTS=vhost-user|tap FREEZE=switchover|early BASELINE=1
demo: lab
	cargo build --release -q --workspace --bins
	target/release/gangway-demo --ports $(PORTS) --freeze $(FREEZE) $(if $(BASELINE),--baseline) --out target/demo

# Many moves, by Gangway and by what it is compared with, in turn: a table of medians. RUNS=5
bench-moves: lab
	cargo build --release -q --workspace --bins
	target/release/gangway-series --runs $(RUNS) --out target/bench/moves

# The switch beside OVS-DPDK and with DPDK guests, what holds and idle ports cost, and its stages one by one: about an hour
# on two idle processors, two on busy ones. JSON, tables and pictures: target/bench; docs/benchmarks.md gets the tables. BENCHES="pvp hold" for some of it
bench:
	cargo build --release -q -p gangway-switch -p gangway-benches
	for b in $(BENCHES); do target/release/gangway-$$b || exit 1; done
	cargo bench -q -p gangway-benches --bench micro
	target/release/gangway-page

# Each fault at each step of a migration, on real VMs: docs/reliability.md gets the table, target/chaos JSON and the logs of red
# rows. The table is written only when target/chaos has all cases. That takes about two hours. PORTS=tap (no table) CASE="seal kill-source-switch", CASE=seal (all faults there), CASE=cut-3s (at all steps)
chaos: lab
	cargo build -q --workspace --bins
	target/debug/gangway-chaos --ports $(PORTS) --case "$(CASE)" --page docs/reliability.md

# What the lab needs: packages, guest image
lab:
	@sh deploy/lab/setup.sh
	@sh deploy/lab/image.sh

# All tests: units, and the lab with real VMs. One build serves both
test: lab
	cargo build -q --workspace --bins
	cargo test -q --workspace --exclude gangway-tests
	cargo test -q -p gangway-tests -- --test-threads=1

# Simulated worlds, many more than in `make test`: SEEDS=100000, from the seed FIRST=1 on. SEED=n: that one, with its trace. Then all
# interleavings of a small move with more faults (MODEL=)
soak:
	SEEDS=$(SEEDS) cargo test -q -p gangway-sim --test seeds no_world -- --nocapture
	MODEL=all cargo test -q -p gangway-model --test all the_contract -- --nocapture

# A group of real VMs moves back and forth under traffic for so long: nothing may be lost, and no process or folder of the hosts may
# grow. All figures are in target/soak. MINUTES=30
soak-moves: lab
	cargo build --release -q --workspace --bins
	target/release/gangway-soak --minutes $(MINUTES) --out target/soak

# What a commit must pass
check:
	cargo fmt --all --check
	cargo clippy -q --workspace --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc -q --workspace --no-deps
	@command -v cargo-deny >/dev/null || cargo install --locked -q cargo-deny
	cargo deny -L error check bans licenses sources

# Looks for bytes that break what reads foreign bytes, and puts those that reached something new into tests/fuzz/corpus, which
# `make test` replays; needs g++. The flags are a nightly compiler's, which the stable one takes when told to.
# FUZZ="split_ring qmp" FUZZ_S=120 (seconds each)
fuzz:
	RUSTC_BOOTSTRAP=1 RUSTFLAGS="$(FUZZ_FLAGS)" cargo build -q --release --target $(FUZZ_HOST) -p gangway-fuzz --features search
	for t in $(FUZZ); do target/$(FUZZ_HOST)/release/gangway-fuzz $$t $(FUZZ_S) || exit 1; done
	target/$(FUZZ_HOST)/release/gangway-fuzz pack

# Known vulnerabilities of dependencies; needs the network
audit:
	cargo deny -L error check advisories

clean:
	cargo clean
