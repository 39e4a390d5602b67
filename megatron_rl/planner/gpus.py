# SPDX-License-Identifier: Apache-2.0
"""What a GPU has: NVIDIA's published numbers, not measurements of ours.

A100: A100 80GB / 40GB datasheet (SXM); H100, H200: their datasheets (SXM5); H20: the HGX H20 product brief; B200: HGX
B200 datasheet. bf16 peaks are dense (the datasheets' sparse ones halved). NVLink is per direction (half of the
published sum: 600, 900, 1800 GB/s). The network is one InfiniBand adapter a GPU, as in DGX systems: HDR 200 Gb/s
(A100), NDR 400 Gb/s (others). `memory` is what CUDA shows, rounded down: a little below the name's.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GPUS_PER_NODE = 8


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory in bytes, peak in bf16 FLOP/s, the rest in bytes per second (links: per direction)."""

    name: str
    memory: int
    peak: float
    hbm: float
    nvlink: float
    network: float


def _gpu(name: str, memory_gib: float, tflops: float, hbm_gb: float, nvlink_gb: float, network_gb: float) -> Gpu:
    return Gpu(name, int(memory_gib * GIB), tflops * 1e12, hbm_gb * 1e9, nvlink_gb * 1e9, network_gb * 1e9)


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        _gpu("a100-40g", 39, 312, 1555, 300, 25),
        _gpu("a100-80g", 79, 312, 2039, 300, 25),
        _gpu("h20-96g", 95, 148, 4000, 450, 50),
        _gpu("h100-80g", 79, 989, 3350, 450, 50),
        _gpu("h200-141g", 139, 989, 4800, 450, 50),
        _gpu("b200-180g", 178, 2250, 8000, 900, 50),
    )
}


def gpu_of(name: str) -> Gpu:
    if name not in GPUS:
        raise ValueError(f"--gpu={name}: not in the table; one of {', '.join(GPUS)}")
    return GPUS[name]
