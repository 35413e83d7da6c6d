#!/usr/bin/env bash
# Runs every fuzz target of fuzz/ in turn (the readers of untrusted files, and the CPU kernels) on mutated inputs, under AddressSanitizer.
# Findings are aborts, inputs that take more than five seconds, and inputs that need more than 1 GiB of memory.
#
#     scripts/fuzz.sh [SECONDS] [TARGET...]          seconds for each target [default: 20]
#
# Findings are written to fuzz/artifacts/TARGET; pass one to the target's program to repeat it. Inputs that reached new code are kept in
# $FUZZ_TARGET_DIR/corpus. The corpus in the repository is made by scripts/fixtures/make_fuzz_corpus.py.
#
# Needs a nightly compiler and cargo-fuzz (`cargo install cargo-fuzz`); where one is not installed, prints a line `SKIPPED: ...` and ends
# with 0. The first build takes half an hour on two cores. FUZZ_SANITIZER=none is faster and finds less. With FUZZ_SEED=N the inputs are made
# only from the repository's corpus, in an order that N determines: the same ones each time, as far as the seconds suffice.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "SKIPPED: the fuzz targets: $1"
    exit 0
}

cargo fuzz --version > /dev/null 2>&1 || skip "cargo-fuzz is not installed"
cargo +nightly --version > /dev/null 2>&1 || skip "no nightly compiler is installed"

seconds="${1:-20}"
shift || true
sanitizer="${FUZZ_SANITIZER:-address}"
home="${FUZZ_TARGET_DIR:-$PWD/fuzz/target}"
targets=("$@")
if [ "${#targets[@]}" = 0 ]; then
    mapfile -t targets < <(cargo +nightly fuzz list)
fi

cargo +nightly fuzz build --sanitizer "$sanitizer" --codegen-units 16 --target-dir "$home"
programs="$home/$(rustc +nightly -vV | sed -n 's/^host: //p')/release"

# Targets write their inputs as files, here in memory.
scratch="$(mktemp -d -p "$(test -w /dev/shm && echo /dev/shm || echo "${TMPDIR:-/tmp}")" moonlight-fuzz.XXXXXX)"
trap 'rm -rf "$scratch"' EXIT
export TMPDIR="$scratch" RAYON_NUM_THREADS=2 RUST_BACKTRACE=1
# Memory that is still allocated at the end does not matter, and the leak detector needs ptrace.
export ASAN_OPTIONS="detect_leaks=0:${ASAN_OPTIONS:-}"

failed=()
for target in "${targets[@]}"; do
    corpus="$home/corpus/$target"
    seed=()
    if [ -n "${FUZZ_SEED:-}" ]; then
        corpus="$scratch/corpus/$target"
        seed=("-seed=$FUZZ_SEED")
    fi
    mkdir -p "$corpus" "fuzz/artifacts/$target"
    log="$home/$target.log"
    code=0
    # Twice the time plus a minute: only a target that hangs takes longer.
    timeout "$((2 * seconds + 60))" "$programs/$target" "$corpus" "fuzz/corpus/$target" "${seed[@]}" \
        -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 -max_len=16384 -print_final_stats=1 \
        -artifact_prefix="fuzz/artifacts/$target/" > "$log" 2>&1 || code=$?
    stat() { sed -n "s/^stat::$1: *//p" "$log" | tail -1; }
    printf '%-16s code %s, %s inputs, peak memory %s MB\n' "$target" "$code" "$(stat number_of_executed_units)" "$(stat peak_rss_mb)"
    if [ "$code" != 0 ]; then
        failed+=("$target")
        grep -aE -A12 'a panic left|ERROR:|panicked|Test unit written' "$log" | head -30 || true
    fi
    rm -rf "${scratch:?}"/*
done
if [ "${#failed[@]}" != 0 ]; then
    echo "findings: ${failed[*]} (see fuzz/artifacts and $home/TARGET.log)"
    exit 1
fi
