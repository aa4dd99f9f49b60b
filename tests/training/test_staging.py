from __future__ import annotations

import numpy as np
import pytest
import torch

from argonne.data.staging import Staging


def test_on_a_cpu_an_array_becomes_a_tensor_where_it_lies() -> None:
    array = np.arange(12).reshape(3, 4)
    tensor = Staging(torch.device("cpu")).put(array).take()
    assert tensor.tolist() == array.tolist()
    assert np.shares_memory(tensor.numpy(), array)


@pytest.mark.gpu
def test_on_a_gpu_every_array_arrives_though_its_memory_is_used_again_at_once() -> None:
    source = np.random.default_rng(0)
    staging = Staging(torch.device("cuda"))
    array = np.empty((64, 4097), dtype=np.int64)
    expected, sums, waiting = [], [], []
    for _ in range(20):  # more than there are buffers, and more at a time
        array[:] = source.integers(0, 2**40, array.shape)
        expected.append(int(array.sum()))
        waiting.append(staging.put(array))
        if len(waiting) == 4:
            sums.append(waiting.pop(0).take().sum())
    sums += [staged.take().sum() for staged in waiting]
    assert [int(each) for each in sums] == expected
