"""The encoder as a program that needs none of this project's code: ONNX, and PyTorch's ``torch.export``."""

from __future__ import annotations

import importlib.util
import io
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pipelines.errors import UserError

METADATA = "stec"
"""The key of the metadata in an ONNX file, and, with the suffix .json, their file in a .pt2."""
ANY_BATCH = {"images": {0: torch.export.Dim("batch")}}
"""The size of the first dimension of the input is free."""
ONNX_PACKAGES = ("onnx", "onnxscript")


def onnx_file(encoder: nn.Module, size_px: int, metadata: Mapping[str, Any]) -> bytes:
    """An encoder as an ONNX file: input ``images`` [N, 3, size_px, size_px], output ``features`` [N, D], any N.

    Raises UserError if a package is missing, or ONNX has no equivalent of one of the encoder's operators.
    """
    missing = [name for name in ONNX_PACKAGES if not _is_installed(name)]
    if missing:
        raise UserError(f"--format onnx needs the package {missing[0]}; run pip install -e '.[onnx]'.")
    traced = _traced(encoder, size_px)
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                traced,
                dynamo=True,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=ANY_BATCH,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise UserError(
            f"The encoder cannot be exported to ONNX: {_reason(error)}; use --format torch_export."
        ) from error
    assert program is not None
    program.model.metadata_props[METADATA] = json.dumps(metadata, sort_keys=True)
    content: bytes = program.model_proto.SerializeToString()
    return content


def torch_export_file(encoder: nn.Module, size_px: int, metadata: Mapping[str, Any]) -> bytes:
    """An encoder as a .pt2 file of ``torch.export``, called with images [N, 3, size_px, size_px], any N.

    Raises UserError if it cannot be traced.
    """
    content, extra_files = io.BytesIO(), {f"{METADATA}.json": json.dumps(metadata, sort_keys=True)}
    traced = _traced(encoder, size_px)
    # The weights of a wide encoder are channels-last, about which the writer warns, and which it stores exactly.
    with warnings.catch_warnings(action="ignore"):
        torch.export.save(traced, content, extra_files=extra_files)
    return content.getvalue()


def _traced(encoder: nn.Module, size_px: int) -> torch.export.ExportedProgram:
    """The encoder for any number of images of one size. Raises UserError if it cannot be traced."""
    # Of two images: a batch of one would be taken for a constant.
    example = torch.zeros(2, 3, size_px, size_px)
    try:
        with torch.no_grad():
            return torch.export.export(encoder, (example,), dynamic_shapes=ANY_BATCH)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"The encoder cannot be traced by torch.export ({_first_line(error)}); use --format huggingface."
        ) from error


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # of a module that was set to None
        return False


def _reason(error: BaseException) -> str:
    """What the innermost cause says, in which a missing operator is named."""
    while error.__cause__ is not None:
        error = error.__cause__
    operator = re.search(r"No ONNX function found for <OpOverload\(op='([\w.]+)'", str(error))
    return f"ONNX has no operator for {operator[1]}" if operator else _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].strip().rstrip(".")
