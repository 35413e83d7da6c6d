#!/usr/bin/env python3
"""Four hosts on one machine: does a run end when a host is lost, and can it be resumed?

    cargo build --release --features moonlight-train/mpi --bin moonlight
    python3 scripts/cluster/four_hosts.py target/release/moonlight --times 10

Each host is a network namespace with its own address and host name, joined by a bridge. MPI between them uses TCP, and `ip netns exec`
replaces `ssh`. A run of four ranks is started, one on each host. During a step, or while a checkpoint is written, one host's link is
taken down (connections neither close nor fail), or its rank is killed (SIGKILL). Each time the script checks that

* every process of the run ends, and how long that takes;
* an error names a rank, or an error of the launcher names the rank or its host;
* every folder with a step's name contains a complete checkpoint;
* `--resume` ends with the weights of the undisturbed run, bit for bit.

Needs: root, `ip` (iproute2), `unshare`, Open MPI. Takes: an hour for `--times 10`.
"""

import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

HOSTS = [1, 2, 3, 4]
NETWORK = "10.77.0"
PREFIX = "moonlight-h"

RECIPE = """
[run]
name = "whole"
dir = "{home}/runs"
seed = 5
device = "cpu"
[model]
vocab_size = 262
max_position_embeddings = 64
hidden_size = 96
intermediate_size = 256
num_hidden_layers = 3
num_attention_heads = 2
rms_norm_eps = 1e-5
kv_lora_rank = 32
qk_nope_head_dim = 16
qk_rope_head_dim = 8
v_head_dim = 16
n_routed_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 96
n_shared_experts = 1
first_k_dense_replace = 1
n_group = 1
topk_group = 1
routed_scaling_factor = 1.0
norm_topk_prob = true
[data]
train = ["{home}/text/*.txt"]
valid_fraction = 0.2
tokenizer = "bytes"
sequence_length = 64
cache_dir = "{home}/cache"
[optimizer]
learning_rate = 2e-3
[train]
steps = 24
batch_size = 1
gradient_accumulation = 4
validate_every = 12
validate_batches = 4
checkpoint_every = 3
keep = 2
plots = false
[distributed]
timeout_seconds = {timeout}
"""


def run(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


class Network:
    """The hosts and the bridge between them."""

    def __enter__(self):
        self.__exit__()
        run("ip", "link", "add", "moonlight-br", "type", "bridge")
        run("ip", "link", "set", "moonlight-br", "up")
        for host in HOSTS:
            space, outside = f"{PREFIX}{host}", f"moonlight-v{host}"
            run("ip", "netns", "add", space)
            run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", space)
            run("ip", "link", "set", outside, "master", "moonlight-br", "up")
            run("ip", "-n", space, "addr", "add", f"{NETWORK}.{host}/24", "dev", "eth0")
            run("ip", "-n", space, "link", "set", "eth0", "up")
            run("ip", "-n", space, "link", "set", "lo", "up")
            # Linux retries a dead connection for a quarter of an hour, and `mpirun` waits for it. The ranks do not.
            run("ip", "netns", "exec", space, "sysctl", "-w", "net.ipv4.tcp_retries2=5")
        return self

    def __exit__(self, *_):
        self.clear()
        for host in HOSTS:
            subprocess.run(["ip", "netns", "del", f"{PREFIX}{host}"], capture_output=True)
        subprocess.run(["ip", "link", "del", "moonlight-br"], capture_output=True)

    def clear(self):
        """Ends every process of every host."""
        for host in HOSTS:
            space = f"{PREFIX}{host}"
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            for pid in pids:
                kill(int(pid))

    def cable(self, host, state):
        run("ip", "link", "set", f"moonlight-v{host}", state)

    def sent(self):
        """Bytes that each host has sent."""

        def read(host):
            return run("ip", "netns", "exec", f"{PREFIX}{host}", "cat", "/sys/class/net/eth0/statistics/tx_bytes")

        return [int(read(host).stdout) for host in HOSTS]


def kill(pid):
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def launcher(home):
    """The replacement of ssh: `agent ADDRESS COMMAND...` runs the command on that host."""
    agent = home / "agent"
    agent.write_text(
        "#!/bin/sh\n"
        'host="${1##*.}"; shift\n'
        f'exec ip netns exec "{PREFIX}$host" unshare --uts sh -c "hostname host$host; $*"\n'
    )
    agent.chmod(0o755)
    hosts = ",".join(f"{NETWORK}.{host}" for host in HOSTS)
    network = f"{NETWORK}.0/24"
    options = {
        "btl": "tcp,self",
        "btl_tcp_if_include": network,
        "oob_tcp_if_include": network,
        "plm_rsh_agent": str(agent),
        "plm_rsh_no_tree_spawn": "1",
        # The launcher's own connections: a host that is silent for ten seconds is lost.
        "oob_tcp_keepalive_time": "4",
        "oob_tcp_keepalive_intvl": "2",
        "oob_tcp_keepalive_probes": "3",
    }
    words = [f"--mca {key} {value}" for key, value in options.items()]
    mpirun = f"mpirun --allow-run-as-root --oversubscribe --bind-to none --host {hosts} {' '.join(words)}"
    return lambda command: [
        "ip", "netns", "exec", f"{PREFIX}1", "unshare", "--uts", "sh", "-c",
        f"hostname host1; exec {mpirun} {command}",
    ]  # fmt: skip


def ranks(program):
    """The processes of the run by host, as the kernel lists them."""
    found = {}
    for host in HOSTS:
        pids = subprocess.run(["ip", "netns", "pids", f"{PREFIX}{host}"], capture_output=True, text=True).stdout.split()
        for pid in pids:
            try:
                if os.readlink(f"/proc/{pid}/exe") == str(program):
                    found[host] = int(pid)
            except OSError:
                pass
    return found


def newest(folder):
    names = [int(path.name[5:]) for path in (folder / "checkpoints").glob("step-*")]
    return max(names, default=0)


def metrics(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().count('"train"') if path.exists() else 0


class Trial:
    def __init__(self, arguments, home, network):
        self.program = Path(arguments.program).resolve()
        self.home, self.network = home, network
        self.on_hosts = launcher(home)
        self.recipe = home / "recipe.toml"
        self.recipe.write_text(RECIPE.format(home=home, timeout=arguments.timeout))
        self.environment = dict(os.environ, RAYON_NUM_THREADS="1", RUST_BACKTRACE="0")

    def train(self, name, *more):
        words = f"{self.program} train {self.recipe} --set run.name={name} {' '.join(more)}"
        return subprocess.Popen(
            self.on_hosts(words), env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip

    def whole(self):
        before = self.network.sent()
        process = self.train("whole")
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        after = self.network.sent()
        account = [line for line in output.splitlines() if line.startswith(("sent by", "predicted", "over a"))]
        per_step = [(b - a) / 24 / 1e6 for a, b in zip(before, after)]
        print("\n".join(account))
        print("on the wire, with headers and the launcher:", ", ".join(f"{x:.3f} MB" for x in per_step), "per step")
        self.weights = self.home / "runs/whole/checkpoints/step-00000024/model.safetensors"

    def lose(self, how, when, number):
        name = f"{how}-{when}-{number}"
        folder = self.home / "runs" / name
        process = self.train(name)
        # After a random step, during the next one; or as soon as a checkpoint is being written.
        wanted = random.randrange(4, 20)
        deadline = time.monotonic() + 120
        while True:
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0]
            if when == "step" and metrics(folder) >= wanted:
                break
            if (
                when == "checkpoint"
                and metrics(folder) >= wanted
                and any(folder.glob("checkpoints/.step-*.moonlight-saving"))
            ):
                break
        if when == "step":
            time.sleep(random.random() * 0.03)
        else:
            time.sleep(random.random() * 0.02)
        writing = [path.name for path in folder.glob("checkpoints/.step-*.moonlight-saving")]
        host = random.choice(HOSTS)
        running = ranks(self.program)
        lost = time.monotonic()
        if how == "cut":
            self.network.cable(host, "down")
        else:
            kill(running[host])
        ended = launcher_ended = None
        while (ended is None or launcher_ended is None) and time.monotonic() - lost < 60:
            if launcher_ended is None and process.poll() is not None:
                launcher_ended = time.monotonic() - lost
            if ended is None and not ranks(self.program):
                ended = time.monotonic() - lost
            time.sleep(0.1)
        if launcher_ended is None:
            os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        ended = 60.0 if ended is None else ended
        left = ranks(self.program)
        if how == "cut":
            self.network.cable(host, "up")
        # Processes of the launcher remain on hosts that it could not reach, and would be counted in the next trial.
        self.network.clear()
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        # The launcher names the killed rank, or the host that does not answer, whichever it notices first.
        noticed = [
            line.strip() for line in output.splitlines() if "exited on signal" in line or "Remote daemon:" in line
        ]
        named = bool(errors or noticed)
        before = newest(folder)
        resumed = self.train(name, "--resume")
        try:
            log, _ = resumed.communicate(timeout=180)
        except subprocess.TimeoutExpired:
            stuck = {host: pid for host, pid in ranks(self.program).items()}
            self.network.clear()
            os.killpg(resumed.pid, signal.SIGKILL)
            log, _ = resumed.communicate()
            log += f"\nit did not end; its ranks: {stuck}"
        weights = folder / "checkpoints/step-00000024/model.safetensors"
        equal = resumed.returncode == 0 and weights.exists() and weights.read_bytes() == self.weights.read_bytes()
        torn = re.search("checkpoint `[^`]*` is damaged", log) is not None
        good = (
            not left and launcher_ended is not None and max(ended, launcher_ended) < 30 and named and equal and not torn
        )
        line = (errors + noticed + ["no error"])[0]
        line = re.sub(r"\s+", " ", line)[:110]
        state = f"{writing[0]} being written" if writing else "no checkpoint being written"
        print(
            f"{name}: {'good' if good else 'BAD'}; host {host}, {state}; ranks ended after {ended:.1f} s, launcher "
            f"{'never' if launcher_ended is None else f'{launcher_ended:.1f} s'}; {len(errors)} error lines; resumed "
            f"from step {before}, {'equal' if equal else 'NOT EQUAL'}; {line}",
            flush=True,
        )
        if not good:
            print("\n".join(f"    | {text}" for text in (output + "\n--- resumed\n" + log).splitlines()[-60:]))
        shutil.rmtree(folder, ignore_errors=True)
        return good, ended, launcher_ended or 60.0, bool(writing)


def main():
    parser = common.parser(__doc__)
    parser.add_argument("program", help="`moonlight`, built with the feature `mpi`")
    parser.add_argument("--times", type=int, default=10, help="trials of each kind")
    parser.add_argument("--timeout", type=int, default=5, help="`distributed.timeout_seconds`, whose default is 20")
    parser.add_argument("--only", help="one of cut-step, cut-checkpoint, kill-step, kill-checkpoint")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("error: network namespaces need root")
    with tempfile.TemporaryDirectory(prefix="moonlight-hosts-") as folder, Network() as network:
        home = Path(folder)
        (home / "text").mkdir()
        for file in range(12):
            lines = [
                f"File {file} says {(file * 31 + line) % 17} and {line * file % 7} of {line}." for line in range(40)
            ]
            (home / "text" / f"{file}.txt").write_text("\n".join(lines))
        trial = Trial(arguments, home, network)
        trial.whole()
        failures = 0
        for how in ("cut", "kill"):
            for when in ("step", "checkpoint"):
                if arguments.only and arguments.only != f"{how}-{when}":
                    continue
                results = [trial.lose(how, when, number) for number in range(arguments.times)]
                failures += sum(not good for good, *_ in results)
                times = [ended for _, ended, _, _ in results]
                launcher = [ended for _, _, ended, _ in results]
                print(
                    f"== {how} in a {when}: {sum(good for good, *_ in results)} of {len(results)} good, "
                    f"{sum(writing for *_, writing in results)} while a checkpoint was being written; all ranks ended "
                    f"after {min(times):.1f} to {max(times):.1f} s, the launcher after {min(launcher):.1f} to {max(launcher):.1f} s",
                    flush=True,
                )
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
