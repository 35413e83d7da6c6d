#!/usr/bin/env bash
# Every fuzz target of fuzz/, one after the other: what reads the files of others (and the CPU's kernels) on changed inputs, under
# AddressSanitizer. An abort, an input that takes more than five seconds and memory beyond 1 GiB are findings.
#
#     scripts/fuzz.sh [SECONDS] [TARGET...]          seconds for each target [default: 20]
#
# What is found lies in fuzz/artifacts/TARGET and is tried again by giving it to the program alone. Inputs that reached new code are
# kept in $FUZZ_TARGET_DIR/corpus, not in the repository, whose corpus scripts/make_fuzz_corpus.py makes.
#
# Wants a nightly compiler and cargo-fuzz (`cargo install cargo-fuzz`); where there is none, prints a line `SKIPPED: ...` and ends
# with 0. The first build takes half an hour on two cores. FUZZ_SANITIZER=none is faster, and sees less. With FUZZ_SEED=N the inputs
# are made from the repository's corpus alone, in an order that N decides: the same ones each time, as far as the seconds go.
set -euo pipefail
cd "$(dirname "$0")/.."

skip() {
    echo "SKIPPED: the fuzz targets, for $1"
    exit 0
}

cargo fuzz --version > /dev/null 2>&1 || skip "there is no cargo-fuzz here"
cargo +nightly --version > /dev/null 2>&1 || skip "there is no nightly compiler here"

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

# Inputs are written as files; these stay in memory.
scratch="$(mktemp -d -p "$(test -w /dev/shm && echo /dev/shm || echo "${TMPDIR:-/tmp}")" moonlight-fuzz.XXXXXX)"
trap 'rm -rf "$scratch"' EXIT
export TMPDIR="$scratch" RAYON_NUM_THREADS=2 RUST_BACKTRACE=1
# What the programs have not given back when they end is not of interest, and the leak detector wants ptrace.
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
    # Twice the time, and a minute: a target that stops by itself has not hung.
    timeout "$((2 * seconds + 60))" "$programs/$target" "$corpus" "fuzz/corpus/$target" "${seed[@]}" \
        -max_total_time="$seconds" -timeout=5 -rss_limit_mb=1024 -max_len=16384 -print_final_stats=1 \
        -artifact_prefix="fuzz/artifacts/$target/" > "$log" 2>&1 || code=$?
    stat() { sed -n "s/^stat::$1: *//p" "$log" | tail -1; }
    printf '%-16s code %s, %s inputs, %s MB at most\n' "$target" "$code" "$(stat number_of_executed_units)" "$(stat peak_rss_mb)"
    if [ "$code" != 0 ]; then
        failed+=("$target")
        grep -aE -A12 'a panic left|ERROR:|panicked|Test unit written' "$log" | head -30 || true
    fi
    rm -rf "${scratch:?}"/*
done
if [ "${#failed[@]}" != 0 ]; then
    echo "found something: ${failed[*]} (see fuzz/artifacts and $home/TARGET.log)"
    exit 1
fi
