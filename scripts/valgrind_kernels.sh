#!/usr/bin/env bash
# The CPU kernels and the readers of weight files under valgrind: no read or write out of bounds, no branch on uninitialized memory.
#
#     scripts/valgrind_kernels.sh
#
# valgrind does not support AVX-512: it runs the levels `scalar` and `avx2` (see MOONLIGHT_SIMD), and the tests report the others as
# SKIPPED. Those run under AddressSanitizer, in the target `kernels` of scripts/fuzz.sh. Where valgrind is not installed, prints a line
# `SKIPPED: ...` and ends with 0. valgrind slows a program down by a factor of 20 to 50.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v valgrind > /dev/null; then
    echo "SKIPPED: kernels and readers under valgrind: it is not installed"
    exit 0
fi

suppressions="$(mktemp)"
trap 'rm -f "$suppressions"' EXIT
cat > "$suppressions" <<'EOF'
{
   two dtypes are compared as numbers, including bytes that the variant does not use
   Memcheck:Cond
   ...
   fun:*shared_dtype*
}
EOF

# Cargo starts the tests with it.
runner="$(uname -m | tr '[:lower:]' '[:upper:]')"
export "CARGO_TARGET_${runner}_UNKNOWN_LINUX_GNU_RUNNER=valgrind --quiet --error-exitcode=99 --leak-check=no --fair-sched=yes --suppressions=$suppressions"
export RAYON_NUM_THREADS=2
# Ordinary test runs use hundreds of examples.
export PROPTEST_CASES=8

cargo test -p moonlight-model --lib kernels:: -- --test-threads=1
cargo test -p moonlight-optim --lib flex:: -- --test-threads=1
cargo test -p moonlight-convert --lib -- --test-threads=1 io:: format:: dtype::
echo "nothing found"
