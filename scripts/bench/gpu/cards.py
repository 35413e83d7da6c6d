"""Peaks of cards by NVIDIA's data sheets, to compute shares of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Card:
    """Dense products (no sparsity) in TFLOP/s, sums in f32; bandwidth of the memory in GB/s."""

    name: str
    bf16: float
    tf32: float
    f32: float
    bandwidth: float

    def peak(self, dtype):
        """TFLOP/s of products of a dtype. Burn multiplies f32 in TF32 on cards with tensor cores."""
        return self.bf16 if dtype == "bf16" else self.tf32


# A card is the first line whose words are all in its name, so that special forms come before the usual one.
CARDS = [
    (("h100", "pcie"), Card("H100 PCIe", 756, 378, 51, 2000)),
    (("h100",), Card("H100 SXM", 989, 495, 67, 3350)),
    (("h200",), Card("H200 SXM", 989, 495, 67, 4800)),
    (("a100", "40gb"), Card("A100 40GB", 312, 156, 19.5, 1555)),
    (("a100", "pcie"), Card("A100 PCIe 80GB", 312, 156, 19.5, 1935)),
    (("a100",), Card("A100 SXM 80GB", 312, 156, 19.5, 2039)),
    (("rtx 4090",), Card("RTX 4090", 165, 82.6, 82.6, 1008)),
    (("l40s",), Card("L40S", 362, 183, 91.6, 864)),
    (("b200",), Card("B200", 2250, 1125, 75, 8000)),
]


def find(name, memory_bytes=None):
    """The card with this name, as `nvidia-smi` or the driver has it; `None` for one that the table lacks."""
    # GB200 is another machine, and a "4090 Laptop" or "4090 D" another chip.
    lower = f" {name.lower()} ".replace("-", " ").replace("_", " ")
    if any(word in lower for word in ("laptop", " d ", "gb200", "gh200")):
        return None
    # Some drivers leave the size out of the name.
    if "a100" in lower and memory_bytes and memory_bytes < 50e9:
        lower += "40gb"
    return next((card for words, card in CARDS if all(word in lower for word in words)), None)


def share(rate, peak):
    """A share with three digits, or `None` if one of the two is not known."""
    return round(rate / peak, 4) if rate and peak else None
