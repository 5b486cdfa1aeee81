"""A device's peak operations per second and its memory."""

import resource
from collections.abc import Iterable

import torch

# Dense bfloat16 with float32 accumulation, TFLOP/s, by a part of the GPU's name (vendors' data sheets).
PEAKS = {
    "B200": 2250.0, "H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "A10G": 70.0, "A40": 150.0, "A6000": 155.0, "RTX 5090": 210.0, "RTX 4090": 165.0, "RTX 3090": 71.0,
}  # fmt: skip


def peak_flops(device: torch.device, dtype: torch.dtype, configured_tflops: float | None = None) -> float | None:
    """Peak floating-point operations a second; None if it is not configured and the device is unknown."""
    if configured_tflops:
        return configured_tflops * 1e12
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    return peak_of_gpu(torch.cuda.get_device_name(device))


def peak_of_gpu(name: str, peaks: Iterable[tuple[str, float]] = tuple(PEAKS.items())) -> float | None:
    """The peak of a GPU by name; None if it is not in the table."""
    return next((tflops * 1e12 for part, tflops in peaks if part in name), None)


def memory_gib(device: torch.device) -> float:
    """Peak memory: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def total_memory_gib() -> float | None:
    """Memory of this machine's smallest GPU; None without one."""
    if not torch.cuda.is_available():
        return None
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
