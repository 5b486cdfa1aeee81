"""What a worker's processor can do at most, and how much memory it has and used."""

import resource
from collections.abc import Iterable

import torch

# Dense bfloat16 products with float32 sums, TFLOP/s, by a part of the GPU's name (vendors' data sheets).
PEAKS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A40": 150.0, "A6000": 155.0, "RTX 5090": 210.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype, given_tflops: float | None = None) -> float | None:
    """Floating-point operations a second that the device can do in bfloat16; None if nobody said and the name is unknown."""
    if given_tflops:
        return given_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of_gpu(torch.cuda.get_device_name(device))


def peak_of_gpu(name: str, peaks: Iterable[tuple[str, float]] = tuple(PEAKS.items())) -> float | None:
    """The peak of a GPU of that name; None if it is in no table."""
    return next((tflops * 1e12 for known, tflops in peaks if known in name), None)


def memory_gib(device: torch.device) -> float:
    """Most memory held at a time: by tensors on a GPU, by the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def total_memory_gib() -> float | None:
    """Memory of the smallest GPU at hand; None without one."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
