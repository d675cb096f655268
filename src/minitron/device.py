"""Which device, and which number format is fast on it."""

import time
from typing import Literal

import torch

Precision = Literal["auto", "bfloat16", "float32"]


def pick_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products have hardware of their own; where they do not, they are slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; `auto` is bfloat16 where `fast_bfloat16`, else float32."""
    if precision == "auto":
        return torch.bfloat16 if fast_bfloat16(device) else torch.float32
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[precision]


def settle_precision(precision: Precision) -> Precision:
    """What `auto` means on this machine."""
    return "bfloat16" if compute_dtype(precision, pick_device()) == torch.bfloat16 else "float32"


def matmul_flops_per_second(dtype: torch.dtype, size: int = 2048) -> float:
    """Speed of a large square matrix product on this device: the best of a few."""
    device = pick_device()
    a = torch.ones(size, size, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        (a @ a)[0, 0].item()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
