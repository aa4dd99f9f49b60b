"""Attention within packed documents without a mask; what a GPU does is done here in float64 by the definition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import varlen

from argonne.parallel import context_parallel_attention
from argonne.parallel.communication.groups import Axis
from argonne.parallel.context_parallel import variable_length as module
from argonne.parallel.context_parallel.variable_length import can_vary_length, document_bounds


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begins: Tensor,
    same: Tensor,
    longest: int,
    _: int,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """``varlen_attn`` in plain words: each document alone."""
    assert same is begins
    assert window_size == (-1, 0)
    assert begins.dtype == torch.int32
    lengths = begins.diff().tolist()
    assert max(lengths) == longest
    parts = []
    for q, k, v in zip(query.split(lengths), key.split(lengths), value.split(lengths), strict=True):
        heads = (x.transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=enable_gqa).transpose(0, 1))
    return torch.cat(parts)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
    st.lists(st.integers(1, 5), min_size=1, max_size=6),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_documents_by_their_bounds_are_documents_by_their_mask(batch, heads, lengths, seed, has_groups) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequence = sum(lengths)
    rows = [
        torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths).roll(row)) for row in range(batch)
    ]
    documents = torch.stack(rows)
    query, key, value = (
        torch.randn(batch, count, sequence, 8, dtype=torch.float64, generator=generator).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    )
    weights = torch.randn(batch, heads[0], sequence, 8, dtype=torch.float64, generator=generator)
    results = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "varlen_attn", definition)
        patch.setattr(module, "_offers", lambda option: option != "enable_gqa" or has_groups)
        for bounds in (None, document_bounds(documents)):
            out = context_parallel_attention(query, key, value, Axis("context"), documents, bounds)
            results.append([out, *torch.autograd.grad((out * weights).sum(), (query, key, value))])
    for masked, bounded in zip(*results, strict=True):
        torch.testing.assert_close(bounded, masked, rtol=1e-12, atol=1e-12)


def test_a_row_of_the_batch_begins_a_document_even_where_the_number_goes_on() -> None:
    bounds = document_bounds(torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1], [3, 0, 0, 0]]))
    assert bounds.cumulative.tolist() == [0, 2, 4, 8, 9, 12]
    assert bounds.longest == 4


def test_documents_are_masked_where_flash_attention_does_not_go() -> None:
    assert not can_vary_length(torch.device("cpu"), torch.bfloat16, 64)
    for dtype, head_dim in ((torch.float32, 64), (torch.bfloat16, 81), (torch.bfloat16, 264)):
        assert not can_vary_length(torch.device("cuda"), dtype, head_dim)


@pytest.mark.parametrize(("capability", "can"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_flash_attention_goes_from_compute_capability_80_on(capability, can, monkeypatch) -> None:
    monkeypatch.setattr(module, "_offers", lambda option: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_vary_length(torch.device("cuda"), torch.bfloat16, 64) is can


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
def test_on_a_gpu_documents_by_their_bounds_are_documents_by_their_mask(heads) -> None:
    assert can_vary_length(torch.device("cuda"), torch.bfloat16, 64)
    lengths = torch.tensor([5, 1, 70, 180])
    documents = torch.repeat_interleave(torch.arange(4), lengths).expand(2, -1).cuda()
    query, key, value = (
        torch.randn(2, count, 256, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for count in (heads[0], heads[1], heads[1])
    )
    weights = torch.randn(2, heads[0], 256, 64, device="cuda")
    wide = [x.detach().double().requires_grad_() for x in (query, key, value)]
    axis = Axis("context")
    found = context_parallel_attention(query, key, value, axis, documents, document_bounds(documents))
    expected = context_parallel_attention(*wide, axis, documents)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad((found.float() * weights).sum(), (query, key, value))
    for own, reference in zip(gradients, torch.autograd.grad((expected * weights).sum(), wide), strict=True):
        torch.testing.assert_close(own.double(), reference, rtol=3e-2, atol=3e-2)
