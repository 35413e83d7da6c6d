#!/usr/bin/env bash
# Tests the program and its CubeCL kernels on a WGPU device that needs no GPU: llvmpipe, Mesa's software Vulkan driver. The kernels are compared
# with the reference on the CPU, then scores, a continuation and training steps of the program with the same on the CPU.
#
#     scripts/parity/wgpu_smoke.sh
#
# Needs llvmpipe of Mesa 25 or newer. As root on Debian it is installed (Debian 12: from bookworm-backports). Where it is not available,
# prints a line `SKIPPED: ...` with the reason and ends with 0. The stderr of drivers and programs goes to
# `$CARGO_TARGET_DIR/wgpu-smoke.log`. Takes half an hour to build on two cores, then some minutes.
set -euo pipefail
cd "$(dirname "$0")/../.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}"
mkdir -p "$CARGO_TARGET_DIR"
log="$(realpath "$CARGO_TARGET_DIR")/wgpu-smoke.log"
: > "$log"

skip() {
    echo "SKIPPED: the GPU kernels on WGPU: $1 (see $log)"
    exit 0
}

# The driver's description, which some distributions name after the processor.
driver() {
    find /usr/share/vulkan/icd.d /etc/vulkan/icd.d -name 'lvp_icd*.json' 2> /dev/null | head -1
}

# The version of Mesa, by the package that the driver came with: 25.0.7-2~bpo12+1 is 25.
mesa() {
    dpkg-query -W -f '${Version}' mesa-vulkan-drivers 2> /dev/null | sed 's/^[0-9]*://; s/[^0-9].*//' || true
}

install() {
    [ "$(id -u)" = 0 ] || skip "there is no llvmpipe of Mesa 25 here, and only root can install it"
    command -v apt-get > /dev/null || skip "there is no llvmpipe of Mesa 25 here, and no apt-get to install it"
    local from=()
    local lists=()
    if [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = bookworm ]; then
        # For this installation only: the machine's own sources are not changed.
        sources="$(mktemp -d)"
        trap 'rm -rf "$sources"' EXIT
        cp -a /etc/apt/sources.list.d/. "$sources"
        echo 'deb http://deb.debian.org/debian bookworm-backports main' > "$sources/backports-for-mesa.list"
        lists=(-o "Dir::Etc::SourceParts=$sources")
        from=(-t bookworm-backports)
    fi
    apt-get "${lists[@]}" update -qq >> "$log" 2>&1 || skip "apt-get cannot read its sources"
    DEBIAN_FRONTEND=noninteractive apt-get "${lists[@]}" install -y -qq --no-install-recommends "${from[@]}" \
        mesa-vulkan-drivers libvulkan1 >> "$log" 2>&1 || skip "llvmpipe cannot be installed"
    [ -n "$(driver)" ] || skip "Mesa's packages were installed, and contain no llvmpipe"
    [ "$(mesa)" -ge 25 ] || skip "the newest available llvmpipe is of Mesa $(mesa), which is older than 25"
}

# A driver that the user has chosen takes precedence.
if [ -z "${VK_DRIVER_FILES:-}" ]; then
    version="$(mesa)"
    if [ -z "$(driver)" ] || [ "${version:-0}" -lt 25 ]; then
        install
    fi
    # With this variable the loader uses no other driver of the machine.
    VK_DRIVER_FILES="$(driver)"
    export VK_DRIVER_FILES
fi

run() {
    if ! "$@" 2>> "$log"; then
        tail -n 40 "$log" >&2
        echo "wgpu: failed: $* (the whole output is in $log)" >&2
        exit 1
    fi
}

source scripts/parity/gpu_build.sh
"${tests[@]}" --no-run
# All except the one that compares times, which would fail on a busy machine.
run "${tests[@]}" -- --ignored cube --skip kernels_of_one_pass_are_faster_than_the_reference | tee "$log.tests"
# Cargo succeeds even if a filter matches no test, so the output is checked.
grep -q '^test kernels::cube::tests::attention \.\.\. ok' "$log.tests"
grep -q '^test cube_hostile_arguments_are_refused_or_give_what_the_reference_gives \.\.\. ok' "$log.tests"
run python3 scripts/parity/check_device.py "$CARGO_TARGET_DIR/debug/moonlight"
