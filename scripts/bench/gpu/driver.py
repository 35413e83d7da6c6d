"""Asks CUDA's driver what the first device is, without `nvidia-smi` and without a toolkit. Prints a JSON object.

It is a program of its own because a driver that is not healthy ends the process that loads it."""

import ctypes
import json
import sys

# CUdevice_attribute of cuda.h.
ATTRIBUTES = {
    "multiprocessors": 16,
    "clock_khz": 13,
    "memory_clock_khz": 36,
    "memory_bus_bits": 37,
    "l2_bytes": 38,
    "shared_bytes_per_block": 97,
    "compute_major": 75,
    "compute_minor": 76,
}


def library():
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ctypes.CDLL("libcuda.so")


def main():
    driver = library()

    def ask(name, *arguments):
        status = getattr(driver, name)(*arguments)
        if status:
            raise OSError(f"`{name}` returned {status}")

    number, device = ctypes.c_int(), ctypes.c_int()
    ask("cuInit", 0)
    ask("cuDeviceGet", ctypes.byref(device), int(sys.argv[1]))
    ask("cuDriverGetVersion", ctypes.byref(number))
    found = {"driver_api": f"{number.value // 1000}.{number.value % 1000 // 10}"}
    name = ctypes.create_string_buffer(256)
    ask("cuDeviceGetName", name, len(name), device)
    found["name"] = name.value.decode(errors="replace")
    size = ctypes.c_size_t()
    ask("cuDeviceTotalMem_v2", ctypes.byref(size), device)
    found["memory_bytes"] = size.value
    for key, attribute in ATTRIBUTES.items():
        # A driver that does not know an attribute is asked the others all the same.
        if driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device) == 0:
            found[key] = number.value
    print(json.dumps(found))


if __name__ == "__main__":
    main()
