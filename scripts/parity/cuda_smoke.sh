#!/usr/bin/env bash
# Tests the program and its CubeCL kernels on a CUDA device in software (tools/softcuda), which needs no GPU: every kernel is
# assembled by NVIDIA's ptxas and run on the CPU, and each access to memory is checked. The kernels are compared with the reference
# on the CPU, as a device with tensor cores (8.0) and as one without (7.5), then scores, a continuation and training steps.
#
#     scripts/parity/cuda_smoke.sh [FOLDER]
#
# FOLDER is for LLVM, ptxas and libdevice from PyPI (700 MB), and for kernels that were assembled and compiled before, by default
# ~/.cache/moonlight-cuda. Needs Linux on x86-64, gcc, g++ and
# Python 3.10. Where something is not available, prints a line `SKIPPED: ...` with the reason and ends with 0. Findings of the device
# are in `$CARGO_TARGET_DIR/cuda-smoke/log`. Takes half an hour to build on two cores, then some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

home="${1:-${XDG_CACHE_HOME:-$HOME/.cache}/moonlight-cuda}"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}"
mkdir -p "$CARGO_TARGET_DIR" "$home"
CARGO_TARGET_DIR="$(realpath "$CARGO_TARGET_DIR")"
home="$(realpath "$home")"
log="$CARGO_TARGET_DIR/cuda-smoke.log"
: > "$log"

skip() {
    echo "SKIPPED: the GPU kernels on CUDA: $1 (see $log)"
    exit 0
}

[ "$(uname -sm)" = "Linux x86_64" ] || skip "softcuda runs on Linux on x86-64 only"
command -v gcc > /dev/null && command -v g++ > /dev/null || skip "there is no gcc and g++ here"

# The LLVM that tracel-llvm-bundler would fetch from GitHub. Its folder has the name of the bundler's version.
bundler="$(sed -n '/^name = "tracel-llvm-bundler"/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)"
if [ "$bundler" != 23.1.0-4 ]; then
    echo "cuda: Cargo.lock has tracel-llvm-bundler $bundler, and this script installs the LLVM of 23.1.0-4" >&2
    exit 1
fi
packages=('mlc-llvm-static[all]==23.1.1.post0' 'nvidia-cuda-nvcc-cu12==12.9.86')
if [ "$(cat "$home/ready" 2> /dev/null)" != "${packages[*]}" ]; then
    python3 -m venv "$home/venv" >> "$log" 2>&1 || skip "there is no Python with venv here"
    "$home/venv/bin/pip" install -q "${packages[@]}" >> "$log" 2>&1 || skip "LLVM and ptxas cannot be installed from PyPI"
    echo "${packages[*]}" > "$home/ready"
fi
llvm="$("$home/venv/bin/python" -m mlc_llvm_static.config --prefix)"
CUDA_PATH="$(dirname "$(dirname "$(find "$home/venv/lib" -path '*cuda_nvcc/bin/ptxas')")")"
export CUDA_PATH
mkdir -p "$home/share/tracel"
ln -sfn "$llvm" "$home/share/tracel/tracel-llvm-$bundler"
# With this file the bundler looks no further.
touch "$llvm/.tracel-llvm-installed"

cargo build --release --manifest-path tools/softcuda/Cargo.toml --target-dir "$CARGO_TARGET_DIR/softcuda"
cargo test --manifest-path tools/softcuda/Cargo.toml --target-dir "$CARGO_TARGET_DIR/softcuda"

# One build for both: CubeCL lists CUDA's devices before WGPU's, so that the same programs take this device if it is there.
tests=(cargo test --workspace --features moonlight-train/wgpu,moonlight-train/cuda --lib --test packing --test hostile_kernels)
XDG_DATA_HOME="$home/share" "${tests[@]}" --no-run

# Each buffer is an allocation of its own, so that what is beyond it is found.
work="$CARGO_TARGET_DIR/cuda-smoke"
rm -rf "$work"
mkdir -p "$work" "$home/kernels"
config="cubecl.toml"
[ ! -e "$config" ] || skip "there is a $config in the repository"
trap 'rm -f "$config"' EXIT
printf '[memory]\npersistent_memory = "enforced"\n' > "$config"

run() {
    if ! XDG_DATA_HOME="$home/share" LD_LIBRARY_PATH="$CARGO_TARGET_DIR/softcuda/release" SOFTCUDA_DIR="$home/kernels" \
        SOFTCUDA_LOG="$work/log" SOFTCUDA_COUNTS="$work/counts-%p.json" SOFTCUDA_PTXAS="$CUDA_PATH/bin/ptxas" "$@" 2>> "$log"; then
        tail -n 40 "$log" >&2
        grep FINDING "$work/log" >&2 || true
        echo "cuda: failed: $* (the whole output is in $log, the device's in $work/log)" >&2
        exit 1
    fi
    # A finding that the program survives is one all the same.
    if grep FINDING "$work/log" >&2; then
        exit 1
    fi
}

# Modules for 7.5 and 8.0 are assembled for all later architectures as well.
export SOFTCUDA_ARCHITECTURES=75,80,90a,100a
for sm in 80 75; do
    export SOFTCUDA_SM="$sm"
    # All except the one that compares times.
    run "${tests[@]}" -- --ignored cube --skip kernels_of_one_pass_are_faster_than_the_reference | tee "$log.tests"
    # Cargo succeeds even if a filter matches no test, so the output is checked.
    grep -q '^test kernels::cube::tests::attention \.\.\. ok' "$log.tests"
    grep -q '^test cube_hostile_arguments_are_refused_or_give_what_the_reference_gives \.\.\. ok' "$log.tests"
done
export SOFTCUDA_SM=80
run python3 scripts/parity/check_wgpu.py "$CARGO_TARGET_DIR/debug/moonlight" --device cuda
