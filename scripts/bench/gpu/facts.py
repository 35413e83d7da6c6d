"""Part 1: what the machine is. Later parts need the card's peaks and its memory."""

import datetime
import json
import os
import re
import shutil
import sys

import common
from gpu import cards
from gpu.runner import Absent, Failed

QUERY = (
    "name,driver_version,compute_cap,memory.total,memory.used,clocks.max.sm,clocks.max.memory,clocks.sm,power.limit,"
    "temperature.gpu,pcie.link.gen.max,pcie.link.gen.current,pcie.link.width.max,pcie.link.width.current,"
    "ecc.mode.current,mig.mode.current,persistence_mode,compute_mode"
)


def index(device):
    """The name by which `nvidia-smi` knows a CUDA device; `None` for other devices."""
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return None
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    at = int(number or 0)
    return visible[at] if at < len(visible) else str(at)


def items(day):
    return [("nvidia-smi", 1, nvidia_smi), ("driver", 1, driver), ("doctor", 1, doctor), ("machine", 1, machine)]


def nvidia_smi(day):
    if day.kind != "cuda" or not shutil.which("nvidia-smi"):
        raise Absent("`nvidia-smi` is not there" if day.kind == "cuda" else "the device is not a CUDA device")
    command = ["nvidia-smi", "-i", index(day.device)]
    facts = {}
    # Older versions refuse the whole query for one name that they do not know.
    for name in QUERY.split(","):
        try:
            done = day.runner.run([*command, f"--query-gpu={name}", "--format=csv,noheader"])
            facts[name] = done.stdout.strip()
        except Failed:
            facts[name] = "not known"
    text = day.runner.run(["nvidia-smi"]).stdout
    version = re.search(r"CUDA Version: *([\d.]+)", text)
    facts["CUDA of the driver"] = version.group(1) if version else "not known"
    others = day.runner.run([*command, "--query-compute-apps=pid,used_memory", "--format=csv,noheader"]).stdout
    facts["other programs on the card"] = len(others.split("\n")) - 1
    return {"facts": facts, "topology": day.runner.run(["nvidia-smi", "topo", "-m"], expected=range(256)).stdout}


def driver(day):
    if day.kind != "cuda":
        raise Absent("the device is not a CUDA device")
    number = day.device.partition(":")[2] or "0"
    done = day.runner.run([sys.executable, common.SCRIPTS / "bench/gpu/driver.py", number])
    facts = json.loads(done.stdout)
    if {"memory_clock_khz", "memory_bus_bits"} <= facts.keys():
        # Two transfers a clock.
        facts["memory_gb_per_second"] = facts["memory_clock_khz"] * 1e3 * 2 * facts["memory_bus_bits"] / 8 / 1e9
    card = cards.find(facts["name"], facts["memory_bytes"])
    facts["peaks by data sheet"] = str(card) if card else "not in the table: shares are left out"
    return {"facts": facts}


def doctor(day):
    done = day.call("moonlight", "doctor", "--json", expected=(0, 1))
    report = json.loads(done.stdout)
    devices = {device["device"]: device["description"] for device in report["devices"]}
    facts = {"version": report["version"], "profile": report["build"]["profile"]}
    facts |= {"backends": ", ".join(report["build"]["backends"])}
    facts |= {f"device `{name}`": text for name, text in devices.items()}
    facts |= {f"problem {at + 1}": json.dumps(problem) for at, problem in enumerate(report["problems"])}
    if day.kind not in report["build"]["backends"]:
        raise Failed(f"this `moonlight` was built for {facts['backends']}, and not for `{day.kind}`")
    return {"facts": facts, "doctor": report}


def machine(day):
    facts = {"date": datetime.datetime.now(datetime.UTC).isoformat(" ", "seconds"), "command": " ".join(sys.argv)}
    facts |= {"system": " ".join(os.uname()), "processors": os.cpu_count(), "Python": sys.version.split()[0]}
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as text:
        facts["processor"] = next((line.split(":")[1].strip() for line in text if line.startswith("model name")), "")
    disk = shutil.disk_usage(day.folder)
    facts["free disk"] = f"{disk.free / 1e9:.0f} GB in `{day.folder}`"
    return {"facts": facts}


def learn(day, items):
    """Takes from the part's results what later parts need, also when a second start skipped the part."""
    results = {name: item.get("result", {}) for name, item in items.items()}
    report = results.get("doctor", {}).get("doctor", {})
    asked = results.get("driver", {}).get("facts", {})
    day.backends = report.get("build", {}).get("backends", [])
    name = asked.get("name") or results.get("nvidia-smi", {}).get("facts", {}).get("name") or ""
    day.card = cards.find(name, asked.get("memory_bytes")) if day.kind in ("cuda", "vulkan", "wgpu") else None
    day.memory_bytes = asked.get("memory_bytes")
    if day.kind == "cpu":
        day.memory_bytes = report.get("memory", {}).get("free_bytes")
    if day.memory_gb:
        day.memory_bytes = day.memory_gb * 1e9
