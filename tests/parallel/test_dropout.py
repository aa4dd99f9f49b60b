"""What is dropped follows from seed, step, site and place alone, and is as much as was asked."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch
from torch import Tensor

from argonne.parallel import ArgonneError, Draws, Dropout
from argonne.parallel.sharding import dropout
from argonne.parallel.sharding.dropout import kept, row_keys

GOLDEN, ALL = 0x9E3779B97F4A7C15, 2**64 - 1
DRAWS = Draws(3, 7, torch.tensor([5, 2**40, 6]))


def mixed(word: int) -> int:
    """SplitMix64's hash, in Python's numbers."""
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & ALL
    word = (word ^ word >> 27) * 0x94D049BB133111EB & ALL
    return word ^ word >> 31


def key_of(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little") & ALL


def stays(sample: int, position: int, column: int, probability: float, site: str, head: int | None = None) -> bool:
    """Of one element, without a tensor."""
    key = mixed(mixed(sample * GOLDEN + key_of("3/step 7") & ALL) + (position + 1) * GOLDEN & ALL)
    key = mixed(key + key_of(f"0/{site}") & ALL)
    if head is not None:
        key = mixed(key + (head + 1) * GOLDEN & ALL)
    word = mixed(key + (column // 2 + 1) * GOLDEN & ALL) >> (32 * (column % 2)) & (2**32 - 1)
    signed = word - 2**32 if word >= 2**31 else word
    return signed >= round(probability * 2**32) - 2**31


def keys(positions: int = 4) -> Tensor:
    return row_keys(DRAWS.key, DRAWS.samples, torch.arange(positions))


def test_each_element_is_drawn_as_the_hash_says() -> None:
    ones = torch.ones(3, 4, 9, dtype=torch.float64)
    found = Dropout(0.3, "a.site")(ones, keys())
    of_heads = Dropout(0.3, "a.site").of_heads(ones[:, None].expand(3, 2, 4, 9), keys(), range(3, 5))
    for sample, number in enumerate(DRAWS.samples.tolist()):
        for position in range(4):
            for column in range(9):
                expected = stays(number, position, column, 0.3, "a.site") / 0.7
                assert found[sample, position, column] == expected
                for head in (3, 4):
                    expected = stays(number, position, column, 0.3, "a.site", head) / 0.7
                    assert of_heads[sample, head - 3, position, column] == expected


def test_neither_the_shape_nor_what_is_made_at_a_time_changes_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = kept(keys(50), 33, 0.4)
    assert torch.equal(kept(keys(50)[1:, 20:31], 17, 0.4), whole[1:, 20:31, :17])
    monkeypatch.setattr(dropout, "_CHUNK", {"cpu": 40})
    assert torch.equal(kept(keys(50), 33, 0.4), whole)


@pytest.mark.parametrize("probability", [0.02, 0.1, 0.5, 0.9])
def test_the_share_is_as_asked_in_every_row_and_column(probability: float) -> None:
    dropped = ~kept(row_keys(DRAWS.key, torch.arange(4), torch.arange(256)), 512, probability)
    spread = (probability * (1 - probability)) ** 0.5
    of_all = dropped.double()
    assert abs(of_all.mean().item() - probability) < 4 * spread / dropped.numel() ** 0.5
    for dims, others in (((0, 1), 4 * 256), ((2,), 512)):
        # Each mean is normal; of some hundreds the farthest is within five deviations.
        assert (of_all.mean(dims) - probability).abs().max() < 5 * spread / others**0.5
    # Neighbours along each axis, and an element and that at another site, have nothing to do with each other.
    standard = (of_all - probability) / spread
    another = (~kept(row_keys(DRAWS.key + 1, torch.arange(4), torch.arange(256)), 512, probability)).double()
    pairs = [standard[:, 1:] * standard[:, :-1], standard[..., 1:] * standard[..., :-1]]
    pairs += [standard[1:] * standard[:-1], standard * (another - probability) / spread]
    for product in pairs:
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())


def test_seed_step_sample_and_site_all_count() -> None:
    def drawn(seed: int = 3, step: int = 7, sample: int = 5, site: str = "a") -> bytes:
        rows = row_keys(Draws(seed, step, DRAWS.samples).key, torch.tensor([sample]), torch.arange(8))
        return Dropout(0.5, site)(torch.ones(1, 8, 32), rows).numpy().tobytes()

    alike = [drawn(), drawn(seed=4), drawn(step=8), drawn(sample=6), drawn(site="b")]
    assert drawn() == alike[0]
    assert len(set(alike)) == len(alike)


def test_gradients_are_dropped_as_values_are_and_nothing_is_without_keys() -> None:
    module, x = Dropout(0.25, "a"), torch.randn(3, 4, 10, dtype=torch.float64, requires_grad=True)
    y = module(x, keys())
    y.sum().backward()
    scale = (y != 0).double() / 0.75
    assert torch.equal(y, torch.where(scale > 0, x / 0.75, 0))
    torch.testing.assert_close(x.grad, scale)
    assert module(x, None) is x
    assert Dropout(0.0, "a")(x, keys()) is x


@pytest.mark.parametrize("value", [1, -0.1, float("nan"), True, "a"])
def test_what_is_no_share_is_refused(value: object) -> None:
    with pytest.raises(ArgonneError, match="probability="):
        Dropout(value, "a")  # type: ignore[arg-type]


@pytest.mark.gpu
def test_a_gpu_draws_the_same() -> None:
    assert torch.equal(kept(keys(50).cuda(), 333, 0.1).cpu(), kept(keys(50), 333, 0.1))
