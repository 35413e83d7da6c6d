#!/usr/bin/env bash
# The program and its CubeCL kernels on a WGPU device that needs no GPU: llvmpipe, Mesa's Vulkan in software. The kernels are held
# against the reference on the CPU, then scores, a continuation and training steps of the program against the same on the CPU.
#
#     scripts/wgpu_smoke.sh
#
# Wants llvmpipe of Mesa 25 or newer. On Debian, root is given it (Debian 12: from bookworm-backports); where it is not to be had,
# prints a line `SKIPPED: ...` with the reason and ends with 0. What the drivers and the programs say on stderr goes to
# `$CARGO_TARGET_DIR/wgpu-smoke.log`.
set -euo pipefail
cd "$(dirname "$0")/.."

export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-target}"
mkdir -p "$CARGO_TARGET_DIR"
log="$(realpath "$CARGO_TARGET_DIR")/wgpu-smoke.log"
: > "$log"

skip() {
    echo "SKIPPED: the test on WGPU, for $1 (see $log)"
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
        # For this installation alone: the machine's own sources stay as they are.
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
    [ -n "$(driver)" ] || skip "Mesa's packages were installed, and no llvmpipe came with them"
    [ "$(mesa)" -ge 25 ] || skip "the newest llvmpipe to be had is of Mesa $(mesa), which is older than 25"
}

# Whoever names a driver gets that one.
if [ -z "${VK_DRIVER_FILES:-}" ]; then
    version="$(mesa)"
    if [ -z "$(driver)" ] || [ "${version:-0}" -lt 25 ]; then
        install
    fi
    # The loader takes no other, whatever else the machine has.
    VK_DRIVER_FILES="$(driver)"
    export VK_DRIVER_FILES
fi

run() {
    if ! "$@" 2>> "$log"; then
        tail -n 40 "$log" >&2
        echo "wgpu: failed: $* (all of it in $log)" >&2
        exit 1
    fi
}

# One build for both: for a test of the program, cargo builds the program with what the other tests are built with.
tests=(cargo test --workspace --features moonlight-train/wgpu --lib --test packing --test hostile_kernels)
"${tests[@]}" --no-run
# All but the one that compares times, which a busy machine would fail.
run "${tests[@]}" -- --ignored cube --skip kernels_of_one_pass_are_faster_than_the_reference | tee "$log.tests"
# A name that no test has is no error to cargo.
grep -q '^test kernels::cube::tests::attention \.\.\. ok' "$log.tests"
grep -q '^test cube_hostile_arguments_are_refused_or_give_what_the_reference_gives \.\.\. ok' "$log.tests"
run python3 scripts/check_wgpu.py "$CARGO_TARGET_DIR/debug/moonlight"
