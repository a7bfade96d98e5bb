# Needs a Rust toolchain (rustc 1.95 or newer, with rustfmt and clippy); `make setup` brings everything else on Debian.

CARGO  ?= cargo
VENV   := target/venv
PYTHON := $(VENV)/bin/python
BIN    := target/debug/envelopefs

.PHONY: help setup build check fmt lint features test test-rust test-reader test-fuzz bench bench-services bench-rotation kill-test storm-test fuzz quickstart install clean

help:
	@echo 'make quickstart   install what is needed, build, and show a store at work in a temporary folder'
	@echo 'make setup        Debian packages and the Python environment of the tests'
	@echo 'make build        release binary: target/release/envelopefs'
	@echo 'make check        the gate: format, lints, every test'
	@echo 'make test         every test'
	@echo 'make bench        ratios to the native directory and to gocryptfs (BENCH_ARGS=--quick for a short run)'
	@echo 'make bench-services  making and opening files with root keys in key services'
	@echo 'make bench-rotation  speed of a rotation beside that of the disk, and what it costs users (BENCH_ARGS=--files=1000000)'
	@echo 'make kill-test    kill -9 of the daemon under load, again and again (KILLS=100)'
	@echo 'make storm-test   rotations while files and directories are renamed all the time (SECONDS=180)'
	@echo 'make fuzz         coverage-guided fuzzing (TARGET=header SECONDS=60)'
	@echo 'make install      copies the release binary and the mount helper (PREFIX=/usr/local)'

setup: $(PYTHON)

# Packages are installed only if something is missing, so that a machine that has everything needs no network.
$(PYTHON): scripts/setup.sh tests/reader/requirements.txt tests/support/requirements.txt
	scripts/setup.sh $(VENV)
	@touch $(PYTHON)

build:
	$(CARGO) build --release --locked

check: setup fmt lint features test

fmt:
	$(CARGO) fmt --check

lint:
	$(CARGO) clippy --locked --all-targets -- -D warnings

# A build may leave out any kind of key service.
features:
	for f in "" aws-kms gcp-kms vault pkcs11; do \
		$(CARGO) clippy --locked --no-default-features --features "$$f" -- -D warnings || exit 1; done

test: test-rust test-reader test-fuzz

test-rust:
	$(CARGO) test --locked

# The second reader, written from docs/FORMAT.md alone, against a store made by the program.
test-reader: $(PYTHON)
	$(CARGO) build --locked
	ENVELOPEFS=$(BIN) $(PYTHON) -B -m unittest discover -v -s tests/reader -p 'test_*.py'

# Builds the fuzz targets with libFuzzer on the stable toolchain and gives each a fixed number of inputs.
test-fuzz:
	scripts/fuzz.sh smoke

fuzz:
	scripts/fuzz.sh run $(or $(TARGET),header) $(or $(SECONDS),60)

bench: build
	scripts/bench.py --binary target/release/envelopefs $(BENCH_ARGS)

bench-services: setup build
	$(PYTHON) scripts/services_bench.py --binary target/release/envelopefs $(BENCH_ARGS)

bench-rotation: build
	scripts/rotation_bench.py --binary target/release/envelopefs $(BENCH_ARGS)

kill-test: build
	scripts/kill_test.py --binary target/release/envelopefs --kills $(or $(KILLS),100)

storm-test: build
	scripts/rename_storm.py --binary target/release/envelopefs --seconds $(or $(SECONDS),180)

quickstart: setup build
	scripts/quickstart.sh target/release/envelopefs

PREFIX ?= /usr/local
install: build
	install -D -m 0755 target/release/envelopefs $(DESTDIR)$(PREFIX)/bin/envelopefs
	install -D -m 0755 mount.fuse.envelopefs $(DESTDIR)/sbin/mount.fuse.envelopefs

clean:
	$(CARGO) clean
