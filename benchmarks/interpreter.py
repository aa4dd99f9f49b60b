"""Triton's interpreter, made to round to bfloat16 as a GPU does."""

from __future__ import annotations

from typing import Any

import torch


def round_to_nearest_even() -> None:
    """Let the interpreter's float32 -> bfloat16 round to nearest even; as it comes (Triton 3.9) it truncates.

    Of the whole process. To be called where ``argonne.kernels.dispatch.interprets`` says so.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    as_it_comes = interpreter._convert_float
    if getattr(as_it_comes, "rounds", False):
        return

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return as_it_comes(values, source, target, rounding_mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    convert.rounds = True  # type: ignore[attr-defined]
    interpreter._convert_float = convert
