"""Small models of every family as ``transformers`` makes them, and what they compute in float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from argonne.checkpoint import load_pieces, save_checkpoint, weight_pieces
from argonne.files import write_json
from argonne.models import Execution, build_model, from_huggingface
from argonne.models.recompute import Recompute
from argonne.parallel import Layout, Precision, ProcessGroups, complete_gradients
from tests.losses import summed_loss
from tests.whole import Parts, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
TOKENS: dict[str, int | None] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
CONFIG_NAMES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config"}


@contextmanager
def in_float64() -> Iterator[None]:
    """``transformers`` computes norms, rotary tables and softmax in float32 whatever the model's dtype: not in here."""
    with mock.patch.object(torch, "float32", torch.float64), mock.patch.object(torch, "float", torch.float64):
        yield


@dataclass(frozen=True)
class Case:
    """A model of a family, where it is computed, and on what."""

    fields: dict[str, Any]
    """Of its ``config.json``."""
    layout: Layout
    batch: int
    length: int
    recompute: Recompute = Recompute.NONE

    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.length)
        return torch.randint(0, self.fields["vocab_size"], (self.batch, self.length + 1), generator=generator)


@st.composite
def ropes(draw: st.DrawFn, original: int) -> dict[str, Any]:
    """The rotation of a model whose context is four times the original, in either spelling."""
    kind = draw(st.sampled_from(["default", "linear", "llama3", "yarn"]))
    theta = draw(st.sampled_from([500.0, 10_000.0, 1e6]))
    rope: dict[str, Any] = {"rope_type": kind}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([1.0, 3.5, 4.0, 8.0]))
    if kind == "llama3":
        low = draw(st.floats(0.1, 2.0))
        rope |= {"low_freq_factor": low, "high_freq_factor": low + draw(st.floats(0.2, 4.0))}
    if kind == "yarn":
        slow = draw(st.floats(0.1, 2.0))
        optional = {
            "beta_fast": slow + draw(st.floats(0.0, 40.0)),
            "beta_slow": slow,
            "truncate": draw(st.booleans()),
            "attention_factor": draw(st.floats(0.5, 2.0)),
            "mscale": draw(st.floats(0.0, 2.0)),
            "mscale_all_dim": draw(st.floats(0.0, 2.0)),
        }
        chosen = draw(st.sets(st.sampled_from(sorted(optional))))
        if "beta_fast" in chosen:
            chosen = chosen | {"beta_slow"}
        rope |= {name: optional[name] for name in sorted(chosen)}
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = original
    if draw(st.booleans()):  # as transformers 4 writes it
        return {"rope_theta": theta, "rope_scaling": None if kind == "default" else rope}
    return {"rope_parameters": {**rope, "rope_theta": theta}}


@st.composite
def cases(draw: st.DrawFn, ranks: int) -> Case:
    """Odd sizes, every ratio of heads, shared or whole key-value heads."""
    family = draw(st.sampled_from(sorted(CONFIG_NAMES)))
    kv = draw(st.integers(1, 5))
    group = draw(st.integers(1, 6).filter(lambda g: ranks <= kv * g <= 12))
    heads, original = kv * group, draw(st.integers(1, 5))
    width, dim = draw(st.integers(1, 5)), 2 * draw(st.integers(1, 5))
    fields: dict[str, Any] = {
        "model_type": family,
        "hidden_size": heads * (dim if family == "qwen2" and draw(st.booleans()) else width),
        "num_hidden_layers": draw(st.integers(1, 2)),
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": dim,
        "vocab_size": draw(st.integers(3, 60)),
        "intermediate_size": draw(st.integers(ranks, 30)),
        "max_position_embeddings": 4 * original,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "tie_word_embeddings": draw(st.booleans()),
        **draw(ropes(original)),
    }
    if family in ("llama", "qwen3"):
        fields["attention_bias"] = draw(st.booleans())
    if family == "mistral":
        fields["sliding_window"] = None
    if family == "qwen2" and fields["hidden_size"] == heads * dim:
        del fields["head_dim"]  # which its class does not have
    length, batch = 4 * original, draw(st.integers(1, 2))
    sequence = draw(st.booleans())
    if sequence and batch * length % ranks:
        batch = ranks
    layout = Layout(tensor=ranks, sequence_parallel=sequence, uneven_shards=True)
    return Case(fields, layout, batch, length, draw(st.sampled_from([Recompute.NONE, Recompute.FULL])))


def make(case: Case, directory: Path) -> None:
    """A model of ``transformers`` with weights away from any symmetry, saved as it saves itself."""
    fields = {name: value for name, value in case.fields.items() if name != "model_type"}
    config = AutoConfig.for_model(case.fields["model_type"], **fields, **TOKENS)
    with in_float64():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(1 + 0.3 * noise if name.endswith("norm.weight") else 0.4 * noise)
    model.save_pretrained(directory)


def expected(directory: Path, ids: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], Any]:
    """Logits, every weight, every gradient of the mean loss and the config, of what ``transformers`` opens there."""
    with in_float64():
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, attn_implementation="eager")
        logits = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return logits.detach(), weights, gradients, model.config


def computed(groups: ProcessGroups, case: Case, directory: Path, saved: Path | None) -> tuple[Tensor, Parts, Parts]:
    """This rank's logits, and its parts of the weights and of their gradients; the model saved again."""
    model = build_model(from_huggingface(directory), Execution(groups, DOUBLE, recompute=case.recompute))
    load_pieces(directory, weight_pieces(model.sharded_parameters()))
    ids = case.ids()
    logits = model.logits(ids[:, :-1]).detach()
    (summed_loss(model, ids[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()).backward()
    parameters = model.sharded_parameters()
    complete_gradients(parameters, groups)
    if saved is not None:
        written = model.config_json(case.fields["max_position_embeddings"], TOKENS, "float64")

        def write_rest(step: Path) -> None:
            write_json(step / "config.json", written)

        save_checkpoint(saved, 1, weight_pieces(parameters), [], write_rest, groups)
    parts = [parts_of(model, groups, value) for value in (lambda p: p, lambda p: p.grad)]
    return logits, *parts
