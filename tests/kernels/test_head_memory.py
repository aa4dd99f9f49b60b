"""What a training step of the output head allocates, from torch's own count of it.

Both ways make the weight's gradient in float32 and its copy in the compute dtype, which at 4,096 tokens are a third of
what whole logits take; they are counted apart, so that the ratio is of what the logits cost.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from argonne.kernels import linear_cross_entropy
from argonne.models import preset
from argonne.parallel import Precision, ProcessGroups, VocabParallelHead

CONFIG = preset("argonne-2.0-2b")
TOKENS = 4096
SCALE = 4


def head_and_input(scale: int, device: str) -> tuple[VocabParallelHead, Tensor, Tensor]:
    """The head of the 2B preset in bfloat16 over float32 weights, every size divided by ``scale``."""
    hidden, vocabulary, tokens = CONFIG.hidden_size // scale, CONFIG.vocab_size // scale, TOKENS // scale
    with torch.device(device):
        precision = Precision(compute=torch.bfloat16)
        head = VocabParallelHead(vocabulary, hidden, ProcessGroups.single(device), precision=precision)
        torch.nn.init.normal_(head.weight, std=0.02)
        x = torch.randn(tokens, hidden, dtype=torch.bfloat16).requires_grad_()
        return head, x, torch.randint(0, vocabulary, (tokens,))


def whole(head: VocabParallelHead, x: Tensor, targets: Tensor) -> Tensor:
    """As one would write it without a fused loss."""
    return F.cross_entropy(F.linear(x, head.weight.to(x.dtype)).float(), targets, reduction="sum")


def fused(head: VocabParallelHead, x: Tensor, targets: Tensor) -> Tensor:
    return linear_cross_entropy(x, head, targets)


def of_the_weight(head: VocabParallelHead) -> int:
    """Bytes of the weight's gradient and of its copy in bfloat16."""
    return head.weight.numel() * (4 + 2)


def peak_on_cpu(loss: Callable[[VocabParallelHead, Tensor, Tensor], Tensor]) -> int:
    """The most bytes that a step held above what was there before, and above the weight's."""
    head, x, targets = head_and_input(SCALE, "cpu")
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loss(head, x, targets).backward()
    assert profiler.profiler is not None
    held = most = 0
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most - of_the_weight(head)


def test_the_logits_of_a_2b_head_a_quarter_in_every_size_cost_a_quarter_at_most() -> None:
    apart, together = peak_on_cpu(whole), peak_on_cpu(fused)
    logits = (TOKENS // SCALE) * (CONFIG.vocab_size // SCALE) * 4
    assert apart > 2 * logits, "the logits in float32 and their gradient were never there"
    assert 4 * together <= apart, f"{together / 2**20:.1f} MiB fused, {apart / 2**20:.1f} MiB with whole logits"


@pytest.mark.gpu
def test_the_logits_of_the_2b_head_cost_a_quarter_at_most_on_gpu() -> None:
    peaks = []
    for loss in (whole, fused):
        head, x, targets = head_and_input(1, "cuda")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(head, x, targets).backward()
        peaks.append(torch.cuda.max_memory_allocated() - before - of_the_weight(head))
        del head, x
    assert 4 * peaks[1] <= peaks[0], f"{peaks[1] / 2**20:.0f} MiB fused, {peaks[0] / 2**20:.0f} MiB with whole logits"
