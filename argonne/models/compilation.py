"""Blocks that ``torch.compile`` has compiled, and what a rank would send in them.

A block is compiled for training only: what is evaluated or generated, in other shapes, is computed as ever. Hooks,
recomputation and what FSDP gathers stay outside. Nothing of it is imported, or takes time, before a block is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import einops
import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Graph:
    """What was compiled of one block: the collectives of its forward and of its backward, in their order."""

    forward: tuple[str, ...] = ()
    backward: tuple[str, ...] = ()


class CompiledForward:
    """Takes the place of a block's ``forward``: eager until ``is_on``, then compiled where gradients are wanted."""

    def __init__(self, block: nn.Module) -> None:
        self.block, self.is_on = block, False
        self._eager: Callable[..., Tensor] = block.forward
        self._compiled = self._eager

    def __call__(self, *inputs: Any) -> Tensor:
        forward = self._compiled if self.is_on and torch.is_grad_enabled() else self._eager
        return forward(*inputs)

    def prepare(self, compute: torch.dtype, *inputs: Any) -> Graph:
        """Compile forward and backward for such inputs; nothing is computed, nothing sent, no gradient made.

        ``compute`` is the dtype in which FSDP gathers parameters.

        Raises:
            Exception: whatever keeps the compiler from it.
        """
        # One graph for all blocks that are alike, and one shape: what may change from step to step is marked.
        self._compiled = torch.compile(self._eager, backend=_compile, fullgraph=True, dynamic=False)
        on_gpu = any(parameter.is_cuda for parameter in self.block.parameters())
        with torch.enable_grad(), _as_gathered(self.block, compute), _preparing(on_gpu):
            try:
                self._compiled(*inputs)
            except _Prepared as prepared:
                return prepared.graph
        raise RuntimeError("the compiler has passed it over")


def compile_block(block: nn.Module) -> None:
    """Have ``block`` compute compiled once its forward is prepared and on."""
    block.forward = CompiledForward(block)


class _Prepared(BaseException):
    """What compiled code raises while it is prepared, in place of running."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph


_is_preparing = False


@contextmanager
def _preparing(on_gpu: bool) -> Iterator[None]:
    """Have what is called compile all that it will need, its backward too, and stop there."""
    global _is_preparing
    import torch._dynamo.config as dynamo
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor
    from torch._dynamo import allow_in_graph

    # As calls: what einops has seen so far elsewhere, of NumPy say, would count as what the graph depends on.
    for each in (einops.rearrange, einops.reduce, einops.repeat):
        allow_in_graph(each)
    with ExitStack() as stack:
        # Graphs that were kept would not be seen; what the C++ compiler or Triton has made of them is still kept.
        stack.enter_context(functorch.patch(enable_autograd_cache=False, force_non_lazy_backward_lowering=True))
        if not on_gpu:  # processes that compile Triton's programs would be started on every rank, for nothing
            stack.enter_context(inductor.patch(compile_threads=1))
        stack.enter_context(dynamo.patch(recompile_limit=1024, accumulated_recompile_limit=1 << 16))
        _is_preparing = True
        try:
            yield
        finally:
            _is_preparing = False


def _compile(module: Any, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Inductor, which tells what its graphs send."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    graph = Graph()

    def compile_one(traced: Any, *arguments: Any, **options: Any) -> Any:
        sent = tuple(_sent(traced.graph))
        if options.get("is_backward"):
            graph.backward = sent
        else:
            graph.forward = sent
        return compile_fx_inner(traced, *arguments, **options)

    # Ranks of unequal parts would order their collectives by what each has most of. And what is timed to be chosen, on
    # a GPU, is chosen anew at each start.
    options = {"reorder_for_peak_memory": False, "deterministic": any(x.is_cuda for x in _tensors(inputs))}
    run: Any = compile_fx(module, inputs, compile_one, config_patches=options)

    def call(*arguments: Any) -> Any:
        if _is_preparing:
            raise _Prepared(graph)
        return run(*arguments)

    return call


def _tensors(inputs: Sequence[Any]) -> Iterator[Tensor]:
    return (x for x in inputs if isinstance(x, Tensor))


def _sent(graph: torch.fx.Graph) -> Iterator[str]:
    """The collectives of a graph: what, of which dtype and shape, and over which process group."""
    for node in graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "_c10d_functional":
            continue
        name = node.target._opname
        if name != "wait_tensor":
            value = node.args[0].meta["val"]
            yield f"{name}({str(value.dtype).removeprefix('torch.')} {list(value.shape)}) over {node.args[-1]}"


@contextmanager
def _as_gathered(block: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Give ``block`` parameters such as FSDP gathers, where it has some rows only, for as long as this lasts."""
    kept: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if type(parameter.data) is not Tensor:  # a DTensor, whose shape is that of the whole
                kept.append((module, name, parameter))
    try:
        for module, name, parameter in kept:
            whole = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
            module._parameters[name] = nn.Parameter(whole, requires_grad=parameter.requires_grad)
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter
