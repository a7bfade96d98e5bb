#!/usr/bin/env bash
# Fuzz targets on the stable toolchain: libFuzzer comes from the libfuzzer-sys crate, and the coverage instrumentation
# it steers by is an ordinary code generation option, so neither a nightly compiler nor cargo-fuzz is needed.
# (`cargo +nightly fuzz run TARGET` works as well, and adds AddressSanitizer.)
#
#   fuzz.sh smoke              every target, uninstrumented, a fixed number of inputs from a fixed seed
#   fuzz.sh run TARGET SECONDS
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
targets=$(sed -n 's/^name = "\(fuzz_.*\)"$/\1/p' Cargo.toml)

smoke() {
    # The main target directory, so that dependencies are not built twice.
    cargo build --locked --target-dir ../target
    log=$(mktemp)
    trap 'rm -f "$log"' EXIT
    for t in $targets; do
        if ! "../target/debug/$t" -seed=1 -runs=20000 -max_len=8192 -artifact_prefix="$(dirname "$log")/" \
            "seeds/${t#fuzz_}" >"$log" 2>&1; then
            cat "$log" >&2
            exit 1
        fi
        echo "fuzz: $t: 20000 inputs"
    done
}

run() {
    mkdir -p "corpus/$1"
    RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions" \
        cargo build --locked --release --bin "fuzz_$1" --target "$(rustc -vV | sed -n 's/^host: //p')" --target-dir ../target/fuzz
    ../target/fuzz/*/release/"fuzz_$1" -max_total_time="$2" -max_len=8192 "corpus/$1" "seeds/$1"
}

case ${1-} in
    smoke) smoke ;;
    run) run "$2" "$3" ;;
    *) echo 'usage: fuzz.sh smoke | run TARGET SECONDS' >&2; exit 2 ;;
esac
