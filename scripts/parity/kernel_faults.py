#!/usr/bin/env python3
"""Puts faults into the GPU kernels and looks whether their tests find them, on a CUDA device in software.

    scripts/parity/cuda_smoke.sh        # runs this last, with the environment of the device
    python3 scripts/parity/kernel_faults.py cargo test ... --lib

A fault is one instruction of a kernel that `tools/softcuda` changes while the program loads it (`SOFTCUDA_FAULT`, see its README.md): a
barrier is removed, an access goes 4 KiB too far, an accumulator is not set, a shuffle takes another lane, ... Each must make the test of
its kernel fail, by a finding of the device or by values that differ from the reference. A test that passes with a fault, or without one
fails, is an error.

The arguments are the command that runs the kernel tests, without `--` and what follows. Needs: only Python. Takes: two minutes.
"""

import os
import pathlib
import re
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
import common

# The test, the kernel as its name begins, and the fault.
FAULTS = [
    ("routing", "choose_kernel", "barrier:1"),
    ("routing", "choose_kernel", "compare:2"),
    ("routing", "count_kernel", "barrier:0"),
    ("routing", "sort_kernel", "shared:0"),
    ("rows", "dispatch_kernel", "read:1"),
    ("rows", "combine_kernel", "write:0"),
    ("rows", "combine_grad_kernel", "barrier:0"),
    ("grouped_products_on_matrix_units", "grouped_product_kernel_f_f32_s", "fragment:0"),
    ("grouped_products", "grouped_product_kernel", "barrier:1"),
    ("grouped_products", "weight_grad_kernel", "initial:0"),
    ("attention_on_matrix_units", "forward_kernel", "lane:0"),
    ("attention_on_matrix_units", "query_grad_kernel", "fragment:0"),
    ("attention_on_matrix_units", "key_grad_kernel", "shared:0"),
    ("attention_on_matrix_units", "key_grad_kernel", "read:2"),
]

# Without a barrier values may be right by chance, so that these tests look for races, with a fault and without.
RACES = {test for test, _, fault in FAULTS if fault.startswith("barrier")}


def main():
    parser = common.parser(__doc__)
    parser.add_argument("command", nargs="...", help="the command that runs the kernel tests")
    options = parser.parse_args()
    tests = sorted({test for test, _, _ in FAULTS})
    with tempfile.TemporaryDirectory() as home:
        good = [report(options.command, pathlib.Path(home), test, None) for test in tests]
        good += [
            report(options.command, pathlib.Path(home), test, f"{kernel}:{fault}") for test, kernel, fault in FAULTS
        ]
    print(
        f"{len(FAULTS)} faults, {len(good) - good.count(True)} of them or of the tests without a fault not as they must be"
    )
    sys.exit(0 if all(good) else 1)


def report(command, home, test, fault):
    """Runs a test with a fault, or without one, and prints how it ended; whether it is as it must be."""
    log = home / f"{test}-{fault}".replace(":", "-")
    environment = os.environ | {"SOFTCUDA_LOG": str(log), "SOFTCUDA_ARCHITECTURES": "", "SOFTCUDA_TIMEOUT": "20"}
    if fault:
        environment |= {"SOFTCUDA_FAULT": fault}
    if test in RACES:
        environment["SOFTCUDA_CHECKS"] = "all"
    arguments = ["--", "--ignored", "--test-threads", "1", f"cube::tests::{test}"]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    ran = re.search(r"^test .*cube::tests::", done.stdout, re.MULTILINE)
    if fault is None:
        good = done.returncode == 0 and ran
        print(f"{'ok' if good else 'FAILED':6} {test}: passes without a fault")
        return bool(good)
    change = next((line.split("fault put in on purpose: ")[1] for line in lines if "on purpose" in line), None)
    finding = next((line.split("FINDING ")[1] for line in lines if "FINDING" in line), None)
    good = change is not None and ran and done.returncode != 0
    how = short(finding) if finding else ("other values" if done.returncode else "not found")
    print(f"{'ok' if good else 'FAILED':6} {fault}: {change or 'the kernel has no such place'}; {how}")
    return bool(good)


def short(finding):
    """A finding without its kernel, addresses and threads."""
    return re.sub(r"^kernel `[^`]*`: ", "", finding).split(" at 0x")[0].split("; block")[0][:100]


if __name__ == "__main__":
    main()
