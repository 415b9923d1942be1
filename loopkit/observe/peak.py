"""What devices can compute at most."""

import torch

from loopkit.check import positive

# Dense FLOPs a second in bf16 (fp16 where there is no bf16), as the makers' data sheets say; names
# as the driver gives them, the first that is found within the device's name counts.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A30": 165e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 5090": 209.5e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "RTX A6000": 154.8e12,
    "V100": 125e12,
    "T4": 65e12,
    "MI355": 2516e12,
    "MI325": 1307e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}


def peak_of(name: str) -> float | None:
    """Peak FLOPs a second of a device by its name, in bf16; None if it is not known here.

    Example:
        >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("toaster")
        (989000000000000.0, None)
    """
    return next((peak for known, peak in PEAKS.items() if known in name), None)


def peak_flops(device: torch.device, given: float | None) -> float | None:
    """What the user gave, or that of the device; None where neither is known."""
    if given is not None:
        return positive(f"throughput(run, peak_flops={given!r})", "peak_flops", given)
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
