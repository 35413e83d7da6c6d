#!/usr/bin/env bash
# The CPU kernels and the readers of files of weights under valgrind: no read or write outside of memory that is theirs, no
# branch on what nobody has written.
#
#     scripts/valgrind_kernels.sh
#
# valgrind knows no AVX-512: of the levels it runs `scalar` and `avx2` (see MOONLIGHT_SIMD), and the tests name the others as
# SKIPPED. Those run under AddressSanitizer, as the target `kernels` of scripts/fuzz.sh. Where there is no valgrind, prints a line
# `SKIPPED: ...` and ends with 0.
set -euo pipefail
cd "$(dirname "$0")/.."

if ! command -v valgrind > /dev/null; then
    echo "SKIPPED: kernels and readers under valgrind, which is not installed"
    exit 0
fi

suppressions="$(mktemp)"
trap 'rm -f "$suppressions"' EXIT
cat > "$suppressions" <<'EOF'
{
   two dtypes are compared as numbers, with the bytes that their variant does not use
   Memcheck:Cond
   ...
   fun:*shared_dtype*
}
EOF

# Cargo starts the tests by it.
runner="$(uname -m | tr '[:lower:]' '[:upper:]')"
export "CARGO_TARGET_${runner}_UNKNOWN_LINUX_GNU_RUNNER=valgrind --quiet --error-exitcode=99 --leak-check=no --fair-sched=yes --suppressions=$suppressions"
export RAYON_NUM_THREADS=2
# Properties are tested on hundreds of examples elsewhere.
export PROPTEST_CASES=8

cargo test -p moonlight-model --lib kernels:: -- --test-threads=1
cargo test -p moonlight-optim --lib flex:: -- --test-threads=1
cargo test -p moonlight-convert --lib -- --test-threads=1 io:: format:: dtype::
echo "nothing found"
