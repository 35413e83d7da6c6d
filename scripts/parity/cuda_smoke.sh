#!/usr/bin/env bash
# Tests the program and its CubeCL kernels on a CUDA device in software (tools/softcuda), which needs no GPU: every kernel is
# assembled by NVIDIA's ptxas and run on the CPU, and each access to memory is checked. The kernels are compared with the reference
# on the CPU, as a device with tensor cores (8.0) and as one without (7.5), then scores, a continuation, and steps of
# Muon, LoRA, a quantized base, a resumed run and two devices.
#
#     scripts/parity/cuda_smoke.sh
#
# LLVM, ptxas and libdevice come from PyPI (see gpu_build.sh). Needs Linux on x86-64, gcc, g++ and Python 3.10. Where something is not
# available, prints a line `SKIPPED: ...` with the reason and ends with 0. Findings of the device are in
# `$CARGO_TARGET_DIR/cuda-smoke/log`, its counts next to it; compiled kernels are kept in the folder of LLVM. With `CUDA_SMOKE_SECONDS` no
# part begins later than that. Takes half an hour to build on two cores, then a quarter of one.
set -euo pipefail
cd "$(dirname "$0")/../.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}"
mkdir -p "$CARGO_TARGET_DIR"
CARGO_TARGET_DIR="$(realpath "$CARGO_TARGET_DIR")"
log="$CARGO_TARGET_DIR/cuda-smoke.log"
: > "$log"

skip() {
    echo "SKIPPED: the GPU kernels on CUDA: $1 (see $log)"
    exit 0
}

source scripts/parity/gpu_build.sh
[ -z "$no_cuda" ] || skip "$no_cuda"

cargo build --release --manifest-path tools/softcuda/Cargo.toml --target-dir "$CARGO_TARGET_DIR/softcuda"
cargo test --manifest-path tools/softcuda/Cargo.toml --target-dir "$CARGO_TARGET_DIR/softcuda"
"${tests[@]}" --no-run
# What AMD's and Apple's languages cannot say is found without a device.
"${tests[@]}" -- kernels_can_be_said | tee "$log.tests"
grep -q 'kernels_can_be_said_in_hip \.\.\. ok' "$log.tests"

# Each buffer is an allocation of its own, so that what is beyond it is found.
work="$CARGO_TARGET_DIR/cuda-smoke"
rm -rf "$work"
mkdir -p "$work" "$cuda_home/kernels"
config="cubecl.toml"
[ ! -e "$config" ] || skip "there is a $config in the repository"
trap 'rm -f "$config"' EXIT
printf '[memory]\npersistent_memory = "enforced"\n' > "$config"

begin() {
    if [ "$SECONDS" -gt "${CUDA_SMOKE_SECONDS:-86400}" ]; then
        echo "SKIPPED: on CUDA: $1 and what follows: there is no time left"
        exit 0
    fi
}

run() {
    if ! LD_LIBRARY_PATH="$CARGO_TARGET_DIR/softcuda/release" SOFTCUDA_DIR="$cuda_home/kernels" SOFTCUDA_LOG="$work/log" \
        SOFTCUDA_COUNTS="$work/counts-%p.json" SOFTCUDA_PTXAS="$CUDA_PATH/bin/ptxas" "$@" 2>> "$log"; then
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
    begin "the kernel tests as $sm"
    # All except the one that compares times.
    run "${tests[@]}" -- --ignored cube --skip kernels_of_one_pass_are_faster_than_the_reference | tee "$log.tests"
    # Cargo succeeds even if a filter matches no test, so the output is checked.
    grep -q '^test kernels::cube::tests::attention \.\.\. ok' "$log.tests"
    grep -q '^test cube_hostile_arguments_are_refused_or_give_what_the_reference_gives \.\.\. ok' "$log.tests"
done

# Forty steps of Muon. Without tensor cores everything is in f32; with them products are in TF32. Two devices exchange gradients
# through the host, for NCCL has no device here.
export SOFTCUDA_DEVICES=2
export SOFTCUDA_SM=75
begin "the program as 75"
run python3 scripts/parity/check_device.py "$CARGO_TARGET_DIR/debug/moonlight" --device cuda --steps 40 --all --budget 2e-3
export SOFTCUDA_SM=80
begin "the program as 80"
run python3 scripts/parity/check_device.py "$CARGO_TARGET_DIR/debug/moonlight" --device cuda --steps 40 --all --budget 1e-2

# bf16 with master weights in f32, against the same on the CPU.
begin "bf16"
run python3 scripts/parity/check_device.py "$CARGO_TARGET_DIR/debug/moonlight" --device cuda --steps 4 --dtype bf16

# Faults that are put into the kernels must be found.
begin "faults in kernels"
run python3 scripts/parity/kernel_faults.py "${tests[@]}"
