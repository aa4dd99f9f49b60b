"""Triton's interpreter, with two of its faults mended: it rounds to bfloat16 as a GPU does, and loops on any NumPy."""

from __future__ import annotations

from typing import Any

import torch


def mend() -> None:
    """Let the interpreter's float32 -> bfloat16 round to nearest even, and its scalars be bounds of loops.

    As they come, 3.6 to 3.9 truncate, and 3.6 takes ``int()`` of an array of one element, which NumPy 2.5 refuses.

    Of the whole process. To be called where ``argonne.kernels.dispatch.interprets`` says so.
    """
    from triton.runtime import interpreter

    if getattr(interpreter, "mended", False):
        return
    interpreter.mended = True
    interpreter._convert_float = _rounding(interpreter._convert_float)
    interpreter._patch_lang_tensor = _indexing(interpreter._patch_lang_tensor)


def _rounding(as_it_comes: Any) -> Any:
    import numpy as np
    import triton.language as tl

    def convert(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) != (tl.float32, tl.bfloat16):
            return as_it_comes(values, source, target, rounding_mode)
        wide = torch.from_numpy(np.ascontiguousarray(values).view(np.float32))
        return wide.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16).reshape(values.shape)

    return convert


def _indexing(as_it_comes: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        as_it_comes(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda scalar: int(scalar.handle.data.item()))

    return patch
