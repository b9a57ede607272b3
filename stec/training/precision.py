"""The choice of the precision for mixed-precision training."""

from __future__ import annotations

import os

import torch

from pipelines.errors import UserError

ISAS_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
"""Values of ``ONEDNN_MAX_CPU_ISA`` with which oneDNN computes bfloat16 by converting from and to float32, which is
slower than float32."""


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes the fastest precision of the device: bf16, else fp16 on a GPU, else no.

    Raises UserError if the device does not support ``precision``.
    """
    if device.type == "cuda":
        fast_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # PyTorch has no public function for these instructions.
        fast_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast_bf16 = fast_bf16 and os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() not in ISAS_WITHOUT_BF16
    if precision == "auto":
        return "bf16" if fast_bf16 else "fp16" if device.type == "cuda" else "no"
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--mixed_precision fp16 needs a CUDA GPU and there is none; use bf16 or no.")
    return precision
