"""The shape of 1.x, which is a GPT-2: from its tensors, and as ``config.json`` has it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from argonne.convert.names import POSITIONS
from argonne.convert.shapes import HEADS, SPECIAL, count_layers, matrix, require_agreement
from argonne.convert.stored import Stored
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_whole

# Layers, width and heads of 1.x.
_GPT2_PRESETS = {"argonne-1.0": (12, 1296, 12), "argonne-1.5": (16, 1296, 16)}

# What GPT2Config takes where a file is silent.
_SILENT: dict[str, Any] = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12}
# What 1.x always was.
_PLAIN: dict[str, Any] = {
    "activation_function": "gelu",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
_SAID = {**_PLAIN, "activation_function": "gelu_new"}  # by a file that is silent


def gpt2_config(tensors: Mapping[str, Stored], told: Mapping[str, Any]) -> dict[str, Any]:
    """The ``config.json`` of a model of 1.x, from its tensors by their own names; raises as ``llama_config``."""
    vocabulary, hidden = matrix(tensors, "token_embedding.weight")
    if POSITIONS not in tensors or len(tensors[POSITIONS].shape) != 3:
        raise ArgonneError(f"tensor {POSITIONS!r} is missing, or not [1, positions, hidden]")
    positions, inner = tensors[POSITIONS].shape[1], matrix(tensors, "blocks.0.mlp.fc1.weight")[0]
    layers = count_layers(tensors)
    shown = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": vocabulary}
    require_agreement({**shown, "max_position_embeddings": positions}, told)
    fits = [heads for *widths, heads in _GPT2_PRESETS.values() if widths == [layers, hidden]]
    heads = told.get("num_attention_heads", fits[0] if fits else None)
    if heads is None:
        raise ArgonneError(f"num_attention_heads is not known: the model is {hidden} wide; {HEADS}")
    if hidden % heads:
        raise ArgonneError(f"num_attention_heads={heads} does not divide the width {hidden}; {HEADS}")
    dropout = told.get("dropout", 0.1)
    dtype = str(tensors["token_embedding.weight"].dtype).removeprefix("torch.")
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": vocabulary,
        "n_positions": positions,
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "n_inner": inner,
        "activation_function": "gelu",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "resid_pdrop": dropout,
        "embd_pdrop": dropout,
        "attn_pdrop": dropout,
        "scale_attn_weights": True,
        "tie_word_embeddings": "head.weight" not in tensors,
        "dtype": dtype,
        "torch_dtype": dtype,
        **SPECIAL,
    }


def complete(config: Mapping[str, Any]) -> dict[str, Any]:
    """A GPT-2's ``config.json`` with the sizes about which it is silent."""
    found = {**_SILENT, **{name: value for name, value in config.items() if value is not None}}
    for name in _SILENT:
        require_whole(name, found[name], 1)
    return found


def require_plain(config: Mapping[str, Any]) -> None:
    """Raise ``ArgonneError`` unless a GPT-2 computes what 1.x does."""
    for name, legal in _PLAIN.items():
        value = config.get(name, _SAID[name])
        if value != legal:
            raise ArgonneError(f"{name}={value!r} has no place in the files of 1.x; legal: {legal!r}")
    width, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    if inner != 4 * width:
        raise ArgonneError(f"n_inner={inner} has no place in the files of 1.x; legal: {4 * width}")


def argonne1_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a file of 1.x is given to say of its shape, in the original's words."""
    names = {"vocab_size": "vocab_size", "block_size": "n_positions"} | {n: n for n in ("n_layer", "n_head", "n_embd")}
    dropout = config.get("resid_pdrop", 0.1)
    return {"model_type": "argonne", **{old: config[new] for old, new in names.items()}, "dropout": dropout}


def with_full_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A GPT-2's tensors by their names in ``GPT2LMHeadModel``, without the buffers that old files have."""
    bare = any(name == "wte.weight" for name in tensors)
    named = {f"transformer.{n}" if bare and n != "lm_head.weight" else n: tensor for n, tensor in tensors.items()}
    return {n: tensor for n, tensor in named.items() if not re.search(r"\.attn\.(masked_)?bias$", n)}


def gpt2_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the GPT-2 that a ``config.json`` describes, by name."""
    hidden, inner = config["n_embd"], config.get("n_inner") or 4 * config["n_embd"]
    found: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (config["vocab_size"], hidden),
        "transformer.wpe.weight": (config["n_positions"], hidden),
    }
    for layer in range(config["n_layer"]):
        for norm in ("ln_1", "ln_2"):
            found |= {f"transformer.h.{layer}.{norm}.{part}": (hidden,) for part in ("weight", "bias")}
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            found[f"transformer.h.{layer}.{name}.weight"] = (rows, columns)
            found[f"transformer.h.{layer}.{name}.bias"] = (columns,)
    found |= {f"transformer.ln_f.{part}": (hidden,) for part in ("weight", "bias")}
    if not config.get("tie_word_embeddings", True):
        found["lm_head.weight"] = (config["vocab_size"], hidden)
    return found
