"""What the original called each tensor, and what Hugging Face calls it: 2.x as Llama, 1.x as GPT-2."""

from __future__ import annotations

import re
from collections.abc import Mapping

from argonne.convert.stored import Stored, concatenated
from argonne.parallel.errors import ArgonneError

_LLAMA = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_LLAMA_BLOCK = {
    "input_norm.weight": "input_layernorm.weight",
    "post_norm.weight": "post_attention_layernorm.weight",
    **{f"attn.{part}_proj.weight": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    **{f"mlp.{part}_proj.weight": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}
POSITIONS = "position_embedding"
"""Of 1.x, ``[1, positions, hidden]``."""

_GPT2 = {
    "token_embedding.weight": "transformer.wte.weight",
    POSITIONS: "transformer.wpe.weight",
    "head.weight": "lm_head.weight",
    "ln_f.weight": "transformer.ln_f.weight",
    "ln_f.bias": "transformer.ln_f.bias",
}
_GPT2_BLOCK = {
    f"{old}.{part}": f"{new}.{part}"
    for old, new in {
        "ln1": "ln_1",
        "ln2": "ln_2",
        "attn.proj": "attn.c_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }.items()
    for part in ("weight", "bias")
}
_QKV = ("attn.query", "attn.key", "attn.value")
_C_ATTN = "attn.c_attn"
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_LLAMA_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_GPT2_LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")


def llama_from_argonne2(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of 2.x under Llama's names."""

    def named(name: str) -> str:
        block = _BLOCK.fullmatch(name)
        return f"model.layers.{block.group(1)}.{_LLAMA_BLOCK[block.group(2)]}" if block else _LLAMA[name]

    return {named(name): tensor for name, tensor in tensors.items()}


def argonne2_name(name: str) -> str:
    """What 2.x called a tensor of a Llama. Raises ``ArgonneError`` if it had none such."""
    block = _LLAMA_LAYER.fullmatch(name)
    old = _reversed(_LLAMA_BLOCK).get(block.group(2)) if block else _reversed(_LLAMA).get(name)
    if old is None:
        raise ArgonneError(f"tensor {name!r} has no place in the files of 2.x; legal: a Llama without biases")
    return f"blocks.{block.group(1)}.{old}" if block else old


def gpt2_from_argonne1(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The tensors of 1.x as GPT-2's: query, key and value in one, and matrices with rows and columns exchanged."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        layer = f"transformer.h.{block.group(1)}." if block else ""
        inner, _, part = block.group(2).rpartition(".") if block else ("", "", "")
        if inner in _QKV:
            if inner == _QKV[0]:
                whole = concatenated(name, [tensors[name.replace(_QKV[0], each)] for each in _QKV], 0)
                found[f"{layer}{_C_ATTN}.{part}"] = whole.transposed() if part == "weight" else whole
        elif block:
            is_matrix = len(tensor.shape) == 2
            found[layer + _GPT2_BLOCK[block.group(2)]] = tensor.transposed() if is_matrix else tensor
        else:
            found[_GPT2[name]] = tensor.reshaped(tensor.shape[1:]) if name == POSITIONS else tensor
    return found


def argonne1_from_gpt2(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """The reverse of ``gpt2_from_argonne1``; the buffer of the causal triangle, which is no weight, is left out."""
    found: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        block = _GPT2_LAYER.fullmatch(name)
        layer = f"blocks.{block.group(1)}." if block else ""
        inner, _, part = block.group(2).rpartition(".") if block else ("", "", "")
        matrix = tensor.transposed() if layer and len(tensor.shape) == 2 else tensor
        if inner == _C_ATTN:
            size = matrix.shape[0] // len(_QKV)
            found |= {f"{layer}{each}.{part}": matrix.part(0, at * size, size) for at, each in enumerate(_QKV)}
            continue
        old = _reversed(_GPT2_BLOCK).get(block.group(2)) if block else _reversed(_GPT2).get(name)
        if old is None:
            raise ArgonneError(f"tensor {name!r} has no place in the files of 1.x; legal: a plain GPT-2")
        found[layer + old] = matrix.reshaped((1, *tensor.shape)) if old == POSITIONS else matrix
    return found


def with_full_names(tensors: Mapping[str, Stored]) -> dict[str, Stored]:
    """A GPT-2's tensors by their names in ``GPT2LMHeadModel``, without the buffers that old files of it have."""
    bare = "wte.weight" in tensors
    named = {f"transformer.{n}" if bare and n != "lm_head.weight" else n: tensor for n, tensor in tensors.items()}
    return {n: tensor for n, tensor in named.items() if not re.search(r"\.attn\.(masked_)?bias$", n)}


def _reversed(names: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in names.items()}
