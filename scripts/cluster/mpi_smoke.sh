#!/usr/bin/env bash
# Two ranks under mpirun train a tiny model. Their weights must equal those of one rank that accumulates, bit for bit; a killed rank
# must end the run; and the run must resume.
#
#     scripts/cluster/mpi_smoke.sh [PROGRAM]
#
# Needs an MPI with its headers (Debian: openmpi-bin, libopenmpi-dev) and libclang (libclang-dev): without PROGRAM it builds `moonlight` with
# MPI. Takes some minutes to build, then a minute.
set -euo pipefail
cd "$(dirname "$0")/../.."

program="${1:-}"
if [ -z "$program" ]; then
    # Built together with a test, so that cargo reuses the dependencies of the tests; a plain build has other features.
    cargo test --workspace --features moonlight-train/mpi --test kill --no-run
    program="${CARGO_TARGET_DIR:-target}/debug/moonlight"
fi
program="$(realpath "$program")"
mpirun=(mpirun --oversubscribe --bind-to none)
if [ "$(id -u)" = 0 ]; then
    mpirun+=(--allow-run-as-root)
fi

home="$(mktemp -d)"
trap 'rm -rf "$home"' EXIT
mkdir "$home/text"
for file in 1 2 3 4 5 6; do
    for line in $(seq 1 30); do
        echo "File $file says $((file * 31 + line)) and $((line * file % 7)) of $line."
    done > "$home/text/$file.txt"
done
cat > "$home/tiny.toml" <<END
[run]
dir = "$home/runs"
device = "cpu"
[model]
vocab_size = 262
max_position_embeddings = 64
hidden_size = 24
intermediate_size = 40
num_hidden_layers = 2
num_attention_heads = 2
rms_norm_eps = 1e-5
kv_lora_rank = 8
qk_nope_head_dim = 8
qk_rope_head_dim = 4
v_head_dim = 8
n_routed_experts = 6
num_experts_per_tok = 2
moe_intermediate_size = 12
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true
[data]
train = ["$home/text/*.txt"]
valid_fraction = 0.2
tokenizer = "bytes"
sequence_length = 32
cache_dir = "$home/cache"
[optimizer]
learning_rate = 2e-3
[train]
steps = 12
batch_size = 2
gradient_accumulation = 2
validate_every = 6
checkpoint_every = 3
plots = false
END

train() {
    local name="$1"
    shift
    "$@" "$program" train "$home/tiny.toml" --set "run.name=$name" "${more[@]}" > "$home/$name.log" 2>&1
}
more=()
train alone env
train two "${mpirun[@]}" -n 2
weights="checkpoints/step-00000012/model.safetensors"
cmp "$home/runs/alone/$weights" "$home/runs/two/$weights"
echo "mpi: two ranks and one have the same weights, bit for bit"
grep -A2 '^sent by a rank' "$home/two.log"

# More steps than the run can take before it is killed.
more=(--set train.steps=100000 --set train.validate_every=0)
train killed "${mpirun[@]}" -n 2 &
launcher=$!
for _ in $(seq 1 600); do
    if [ -e "$home/runs/killed/checkpoints/step-00000006" ]; then break; fi
    sleep 0.1
done
victim="$(pgrep -f "run.name=killed" | while read -r pid; do
    if [ "$(readlink "/proc/$pid/exe")" = "$program" ]; then echo "$pid"; fi
done | tail -1)"
kill -9 "$victim"
started=$SECONDS
if wait "$launcher"; then
    echo "mpi: a run that lost a rank ended without an error" >&2
    exit 1
fi
seconds=$((SECONDS - started))
[ "$seconds" -le 30 ]
grep -q 'exited on signal 9' "$home/killed.log"
last="$(ls "$home/runs/killed/checkpoints" | grep '^step-' | tail -1 | tr -dc 0-9 | sed 's/^0*//')"
more=(--set "train.steps=$((last + 2))" --set train.validate_every=0 --resume)
train killed "${mpirun[@]}" -n 2
grep -q "resumed after step $last" "$home/killed.log"
echo "mpi: a killed rank ended the run within $seconds s, and it resumed after step $last"
