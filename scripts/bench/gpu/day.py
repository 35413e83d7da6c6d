"""What the parts of a day share: programs, device, folder, and what is known about the machine."""

import json
import shutil

import common
from gpu import cards
from gpu.runner import Absent, Failed, Refused

# Of the device's memory, that a prediction may fill: the driver's context and the pools need the rest.
USABLE, CONTEXT = 0.97, 1e9


class Day:
    def __init__(self, options, runner):
        self.device, self.tiny, self.folder, self.runner = options.device, options.tiny, options.out, runner
        self.memory_gb, self.found = options.memory_gb, {}
        self.programs, self.tests = find_programs(options.programs)
        # Facts that later parts use: `card` (of the table), `memory_bytes`, `backends`.
        self.card, self.memory_bytes, self.backends = None, None, []

    @property
    def kind(self):
        """The device without its number."""
        return self.device.split(":")[0]

    def program(self, name):
        if name not in self.programs:
            raise Absent(f"`{name}` is not in the folder of programs")
        return self.programs[name]

    def call(self, name, *arguments, device=None, **options):
        """Runs one of the programs. Those without `--device` take Burn's default device, which a variable chooses."""
        burn = {"cpu": "flex"}.get(device or self.kind, device or self.kind)
        return self.runner.run([self.program(name), *arguments], {"BURN_DEVICE": burn}, **options)

    def last_json(self, name, *arguments):
        """The JSON in the last line that a program prints, and the program's `Done`."""
        done = self.call(name, *arguments)
        try:
            return json.loads(done.stdout.strip().splitlines()[-1]), done
        except (IndexError, json.JSONDecodeError):
            raise Failed(f"`{name}` printed no JSON: {done.stdout[-200:]!r}") from None

    def plan(self, *arguments):
        return self.last_json("moonlight", "plan", *arguments, "--device", self.kind, "--json")[0]

    def fit(self, predicted):
        """Refuses what is predicted not to fit into the device."""
        if self.memory_bytes and predicted > self.memory_bytes * USABLE - CONTEXT * (self.kind != "cpu"):
            has = f"the device has {self.memory_bytes / 1e9:.1f} GB"
            raise Refused(f"`moonlight plan` predicts {predicted / 1e9:.1f} GB; {has}")

    def disk(self, size):
        free = shutil.disk_usage(self.folder).free
        if free < size * 1.05 + 1e9:
            raise Refused(f"it needs {size / 1e9:.0f} GB of disk in `{self.folder}`, {free / 1e9:.0f} GB are free")

    def memory(self, done, predicted=None):
        """The columns about memory. The prediction is for the device, so that on a CPU the host's peak is compared."""
        peak = done.host_peak if self.kind == "cpu" else done.device_peak
        result = {"peak_device_bytes": done.device_peak, "peak_host_bytes": done.host_peak}
        if predicted:
            result |= {"predicted_bytes": predicted, "peak_over_predicted": peak and round(peak / predicted, 4)}
        return result

    def rate(self, operations_per_second, dtype):
        """The columns about operations; tiny shapes have others than those that are counted."""
        if self.tiny:
            return {}
        tflops = operations_per_second / 1e12
        return {"tflops": tflops, "share_of_peak": self.card and cards.share(tflops, self.card.peak(dtype))}

    def bandwidth(self, bytes_per_second):
        """The columns about memory that is read and written."""
        if self.tiny:
            return {}
        rate = bytes_per_second / 1e9
        return {"gb_per_second": rate, "share_of_bandwidth": self.card and cards.share(rate, self.card.bandwidth)}


def find_programs(folder):
    """The programs in a folder by name, and the test programs, which cargo names with a hash."""
    programs, tests = {}, []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_mode & 0o111:
            stem = path.name.removesuffix(".exe")
            if stem.startswith(("moonlight_model-", "hostile_kernels-")):
                tests.append(path)
            else:
                programs[stem] = path
    return programs, tests


def config(name):
    return common.ROOT / "configs" / name
