"""What a launch would compile, and what the compiler made of it, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Launch:
    """A kernel as it was launched."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> tuple[ASTSource, dict[str, int]]:
        """What the JIT would compile for these arguments: specialised for 1, None and multiples of 16."""
        values = dict(zip(self.kernel.arg_names, self.arguments, strict=False))
        values |= {name: value for name, value in self.options.items() if name in self.kernel.arg_names}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        attributes: dict[tuple[int], list[list[Any]]] = {}
        fixed = {parameter.name for parameter in self.kernel.params if parameter.is_constexpr}
        for index, name in enumerate(self.kernel.arg_names):
            value = values[name]
            if name in fixed or value is None or (isinstance(value, int) and value == 1):
                signature[name], constants[name] = "constexpr", value
            elif isinstance(value, Tensor):
                signature[name] = POINTERS[value.dtype]
                if value.storage_offset() * value.element_size() % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if abs(value) < 2**31 else "i64"
                if value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
        options = {name: value for name, value in self.options.items() if name not in self.kernel.arg_names}
        return ASTSource(self.kernel, signature, constants, attributes), options

    def compile(self, capability: int) -> Compiled:
        """Through PTX and ptxas, for a compute capability such as 90."""
        source, options = self.source()
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(made.asm["cubin"])
            file.flush()
            command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        usage = {name: int(count) for name, count in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", said)}
        return Compiled(made.asm["ptx"], usage["REG"], usage["STACK"] + usage["LOCAL"])


@dataclass(frozen=True)
class Compiled:
    """A kernel for one kind of GPU."""

    ptx: str
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes of local memory of a thread."""

    def accesses(self, kind: str) -> set[int]:
        """Widths in bits of its global loads (``ld``) or stores (``st``)."""
        found = re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b", self.ptx)
        return {int(width) * int(count or 1) for count, width in found}


class _Recorder:
    def __init__(self, kernel: Any, log: list[Launch]) -> None:
        self.kernel, self.log = kernel, log

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **options: self.log.append(Launch(self.kernel, grid, arguments, options))


def launches(module: ModuleType, call: Callable[[], Any]) -> list[Launch]:
    """The kernels of ``module`` that ``call`` launches; none of them runs, so that its tensors may be on meta."""
    log: list[Launch] = []
    kernels = {name: value for name, value in vars(module).items() if isinstance(value, triton.JITFunction)}
    with mock.patch.multiple(module, **{name: _Recorder(kernel, log) for name, kernel in kernels.items()}):
        call()
    return log
