# Sourced by cuda_smoke.sh and wgpu_smoke.sh: what both build, so that one build serves both.
#
# Sets `tests`, the command that builds and runs the tests of the GPU kernels: with CUDA and WGPU where LLVM is available from PyPI,
# otherwise with WGPU alone. Sets `no_cuda` to the reason if there is none, and else `cuda_home`, a folder outside the clone with
# LLVM, ptxas and libdevice (700 MB; $MOONLIGHT_CUDA_HOME or ~/.cache/moonlight-cuda), and CUDA_PATH. Needs `log`.

no_cuda=""
cuda_home="${MOONLIGHT_CUDA_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/moonlight-cuda}"
cuda_packages=('mlc-llvm-static[all]==23.1.1.post0' 'nvidia-cuda-nvcc-cu12==12.9.86')

install_cuda() {
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        no_cuda="softcuda runs on Linux on x86-64 only"
        return
    fi
    if ! command -v gcc > /dev/null || ! command -v g++ > /dev/null; then
        no_cuda="there is no gcc and g++ here"
        return
    fi
    # The LLVM that tracel-llvm-bundler would fetch from GitHub. Its folder has the name of the bundler's version.
    local bundler llvm
    bundler="$(sed -n '/^name = "tracel-llvm-bundler"/{n;s/version = "\(.*\)"/\1/p}' Cargo.lock)"
    if [ "$bundler" != 23.1.0-4 ]; then
        echo "cuda: Cargo.lock has tracel-llvm-bundler $bundler, and this script installs the LLVM of 23.1.0-4" >&2
        exit 1
    fi
    mkdir -p "$cuda_home"
    cuda_home="$(realpath "$cuda_home")"
    if [ "$(cat "$cuda_home/ready" 2> /dev/null)" != "${cuda_packages[*]}" ]; then
        if ! python3 -m venv "$cuda_home/venv" >> "$log" 2>&1; then
            no_cuda="there is no Python with venv here"
            return
        fi
        if ! "$cuda_home/venv/bin/pip" install -q "${cuda_packages[@]}" >> "$log" 2>&1; then
            no_cuda="LLVM and ptxas cannot be installed from PyPI"
            return
        fi
        echo "${cuda_packages[*]}" > "$cuda_home/ready"
    fi
    llvm="$("$cuda_home/venv/bin/python" -m mlc_llvm_static.config --prefix)"
    CUDA_PATH="$(dirname "$(dirname "$(find "$cuda_home/venv/lib" -path '*cuda_nvcc/bin/ptxas')")")"
    export CUDA_PATH
    mkdir -p "$cuda_home/share/tracel"
    # Only what is missing, because a newer time of these files would build the compiler, and so Burn, again.
    local link="$cuda_home/share/tracel/tracel-llvm-$bundler"
    [ "$(readlink "$link")" = "$llvm" ] || ln -sfn "$llvm" "$link"
    # With this file the bundler looks no further.
    [ -e "$llvm/.tracel-llvm-installed" ] || touch "$llvm/.tracel-llvm-installed"
    # Where the bundler looks.
    export XDG_DATA_HOME="$cuda_home/share"
}

install_cuda
gpu_features="moonlight-train/wgpu"
if [ -z "$no_cuda" ]; then
    gpu_features="$gpu_features,moonlight-train/cuda"
fi
tests=(cargo test --workspace --features "$gpu_features,moonlight-model/kernel-text" --lib --test packing --test hostile_kernels)
