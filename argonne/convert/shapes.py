"""The shape of a model from its tensors, and from what a file, a flag or a preset says of what tensors cannot."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from argonne.convert.names import POSITIONS
from argonne.convert.stored import Stored
from argonne.files import read_object
from argonne.models import PRESETS, Argonne1Config, ArgonneConfig, Execution, ModelConfig, build_model
from argonne.models.families.argonne1 import DROPOUTS
from argonne.parallel import ArgonneError, ProcessGroups, sharded_parameters
from argonne.parallel.legal import require_whole

SPECIAL: dict[str, int | None] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
"""What is known of special tokens where there is no tokenizer."""

# How the original's configurations call what ours do: 1.x, and 2.x for the sake of 1.x.
_ALIASES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "block_size": "max_position_embeddings",
    "n_positions": "max_position_embeddings",
}
_OLD_FIELDS = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"),
    *("intermediate_size", "max_position_embeddings", "rms_norm_eps", "rope_theta", "tie_word_embeddings"),
)
HEADS = "legal: --num-attention-heads, or --model-config with a config.json that says it"


@dataclass(frozen=True)
class OldFileFlags:
    """What an old file does not say of its model."""

    model_config: Path | None = None
    """A config.json that says what an old file does not."""
    num_attention_heads: int | None = None
    """Query heads [what the file says, or the preset that it fits]."""
    max_position_embeddings: int | None = None
    """The longest sequence [what the file says, the preset's, or 4096]."""

    take_first_rank: bool = False
    """Take rank 0's norms and embedding where the tensor-parallel ranks of an old file have drifted apart."""

    def told(self, of_file: Mapping[str, Any]) -> dict[str, Any]:
        """All that is said of the shape, the flags before --model-config before the file, under our names."""
        told = _our_names(of_file)
        if self.model_config is not None:
            path = self.model_config / "config.json" if self.model_config.is_dir() else self.model_config
            try:
                told |= _our_names(read_object(path))
            except (OSError, ValueError) as error:
                raise ArgonneError(f"model_config={str(path)!r} cannot be read: {error}") from error
        for name in ("num_attention_heads", "max_position_embeddings"):
            if (value := getattr(self, name)) is not None:
                require_whole(name, value, 1)
                told[name] = value
        return told


def argonne2_shape(tensors: Mapping[str, Stored], told: Mapping[str, Any]) -> ArgonneConfig:
    """The shape of a model of 2.x, from its tensors by their own names.

    Raises:
        ArgonneError: they make no model, or nothing says how many heads there are.
    """
    vocabulary, hidden = matrix(tensors, "embed_tokens.weight")
    query, key, gate = (matrix(tensors, f"blocks.0.{part}_proj.weight")[0] for part in ("attn.q", "attn.k", "mlp.gate"))
    layers = count_layers(tensors)
    shown: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "intermediate_size": gate,
    }
    require_agreement(shown, told)
    fits = [
        p for p in PRESETS.values() if isinstance(p, ArgonneConfig) and _widths(p) == (hidden, layers, gate, query, key)
    ]
    heads = told.get("num_attention_heads", fits[0].num_attention_heads if fits else None)
    if heads is None:
        raise ArgonneError(f"num_attention_heads is not known: queries have {query} features together; {HEADS}")
    if query % heads or key % (query // heads):
        raise ArgonneError(
            f"num_attention_heads={heads} does not go with queries of {query} and keys of {key} features; {HEADS}"
        )
    head_dim = query // heads
    require_agreement({"num_key_value_heads": key // head_dim, "head_dim": head_dim}, told)
    given = {name: told[name] for name in ("rms_norm_eps", "rope_theta") if told.get(name) is not None}
    longest = told.get("max_position_embeddings", fits[0].max_position_embeddings if fits else 4096)
    return ArgonneConfig(
        **shown,
        **given,
        num_attention_heads=heads,
        num_key_value_heads=key // head_dim,
        head_dim=head_dim,
        max_position_embeddings=longest,
        tie_word_embeddings="lm_head.weight" not in tensors,
    )


def argonne1_shape(tensors: Mapping[str, Stored], told: Mapping[str, Any]) -> Argonne1Config:
    """The shape of a model of 1.x, from its tensors by their own names; raises as ``argonne2_shape``."""
    vocabulary, hidden = matrix(tensors, "token_embedding.weight")
    if POSITIONS not in tensors or len(tensors[POSITIONS].shape) != 3:
        raise ArgonneError(f"tensor {POSITIONS!r} is missing, or not [1, positions, hidden]")
    positions, width = tensors[POSITIONS].shape[1], matrix(tensors, "blocks.0.mlp.fc1.weight")[0]
    shown: dict[str, Any] = {
        "hidden_size": hidden,
        "num_hidden_layers": count_layers(tensors),
        "vocab_size": vocabulary,
    }
    shown |= {"max_position_embeddings": positions}
    require_agreement(shown, told)
    presets = [p for p in PRESETS.values() if isinstance(p, Argonne1Config)]
    fits = [p for p in presets if (p.hidden_size, p.num_hidden_layers) == (hidden, shown["num_hidden_layers"])]
    heads = told.get("num_attention_heads", fits[0].num_attention_heads if fits else None)
    if heads is None:
        raise ArgonneError(f"num_attention_heads is not known: the model is {hidden} wide; {HEADS}")
    dropout: dict[str, Any] = dict.fromkeys(DROPOUTS, told["dropout"]) if "dropout" in told else {}
    tied = "head.weight" not in tensors
    inner: dict[str, Any] = {} if width == 4 * hidden else {"intermediate_size": width}
    return Argonne1Config(**shown, **inner, **dropout, num_attention_heads=heads, tie_word_embeddings=tied)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model, by name, as its layers declare them."""
    groups = ProcessGroups.single("meta")
    with torch.device("meta"):
        model = build_model(config, Execution(groups))
    return {
        region.name: region.whole_shape for each in sharded_parameters(model, groups) for region in each.spec.regions
    }


def require_tensors(found: Mapping[str, Stored], wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ArgonneError`` unless ``found`` are the ``wanted`` tensors, naming the first that is not."""
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArgonneError(f"tensor {missing[0]!r} is missing{more}")
    if unknown := [name for name in found if name not in wanted]:
        raise ArgonneError(f"tensor {unknown[0]!r} is none of this model's; legal: its tensors, in one layout")
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ArgonneError(f"tensor {name!r} has the shape {list(found[name].shape)}; legal: {list(shape)}")
        if not found[name].dtype.is_floating_point:
            raise ArgonneError(f"tensor {name!r} is of {found[name].dtype}; legal: a floating-point dtype")


def without_tied_head(tensors: Mapping[str, Stored], head: str, embedding: str) -> dict[str, Stored]:
    """The tensors without a head that is the embedding: the original's files have it twice."""
    if head in tensors and embedding in tensors and tensors[head].shape == tensors[embedding].shape:
        one, other = tensors[head].load(), tensors[embedding].load()
        if one.data_ptr() == other.data_ptr() or torch.equal(one, other):
            return {name: tensor for name, tensor in tensors.items() if name != head}
    return dict(tensors)


def argonne2_words(config: ArgonneConfig) -> dict[str, Any]:
    """What a file of 2.x is given to say of its shape. Raises ``ArgonneError`` for what 2.x has not."""
    plain: dict[str, Any] = {"attention_bias": False, "output_bias": False, "qk_norm": False, "rope_scaling": None}
    plain["head_dim"] = config.hidden_size / config.num_attention_heads
    _require_plain(config, plain, "2.x")
    return {"model_type": "argonne2", **{name: getattr(config, name) for name in _OLD_FIELDS}}


def argonne1_words(config: Argonne1Config) -> dict[str, Any]:
    """The same of 1.x."""
    plain: dict[str, Any] = {"activation": "gelu", "layer_norm_eps": 1e-5, "intermediate_size": 4 * config.hidden_size}
    _require_plain(config, plain | dict.fromkeys(DROPOUTS, config.residual_dropout), "1.x")
    names = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
    names |= {"block_size": "max_position_embeddings", "vocab_size": "vocab_size", "dropout": "residual_dropout"}
    return {"model_type": "argonne", **{old: getattr(config, new) for old, new in names.items()}}


def _require_plain(config: ModelConfig, plain: Mapping[str, Any], version: str) -> None:
    for name, legal in plain.items():
        if (value := getattr(config, name)) != legal:
            raise ArgonneError(f"{name}={value!r} has no place in the files of {version}; legal: {legal!r}")


def _our_names(config: Mapping[str, Any]) -> dict[str, Any]:
    renamed = {_ALIASES.get(name, name): value for name, value in config.items() if value is not None}
    for name in ("num_attention_heads", "num_key_value_heads", "max_position_embeddings", "num_hidden_layers"):
        if name in renamed:
            require_whole(name, renamed[name], 1)
    return renamed


def require_agreement(shown: Mapping[str, int], told: Mapping[str, Any]) -> None:
    """Raise ``ArgonneError`` where something else is told than tensors show."""
    for name, value in shown.items():
        if name in told and told[name] != value:
            raise ArgonneError(
                f"{name}={told[name]} is said of the model, and its tensors make it {value}; legal: that"
            )


def matrix(tensors: Mapping[str, Stored], name: str) -> tuple[int, int]:
    """Rows and columns of a tensor. Raises ``ArgonneError`` where it is missing, or no matrix."""
    if name not in tensors:
        raise ArgonneError(f"tensor {name!r} is missing")
    shape = tensors[name].shape
    if len(shape) != 2 or 0 in shape:
        raise ArgonneError(f"tensor {name!r} has the shape {list(shape)}; legal: a matrix")
    return shape[0], shape[1]


def count_layers(tensors: Mapping[str, Stored]) -> int:
    """Blocks of an old model, up to the last that there is."""
    numbers = [int(found.group(1)) for name in tensors if (found := re.match(r"blocks\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _widths(config: ArgonneConfig) -> tuple[int, int, int, int, int]:
    query, key = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    return config.hidden_size, config.num_hidden_layers, config.intermediate_size, query, key
