"""A model as llama.cpp opens it: GGUF, one tensor at a time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.convert.gguf_tokenizer import GGUFTokenizer, gguf_tokenizer
from argonne.convert.stored import Stored, StoredModel
from argonne.files import sync
from argonne.kernels.rotation import rope_frequencies
from argonne.models import ArgonneConfig
from argonne.parallel.errors import ArgonneError

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""llama.cpp's name for each ``model_type``."""

# What llama.cpp's YaRN is not told here: it takes what is usual.
_UNUSUAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}
"""``general.file_type`` of a file whose matrices have this dtype."""


def require_gguf() -> Any:
    """The ``gguf`` package. Raises ``ArgonneError`` saying how to get it."""
    try:
        import gguf
    except ImportError:
        raise ArgonneError("--to gguf needs the gguf package; legal: pip install gguf") from None
    return gguf


def check_gguf(model: StoredModel) -> ArgonneConfig:
    """The shape of a model that can be written. Raises ``ArgonneError`` for what llama.cpp computes in another way."""
    shape, family = model.shape, model.shape.family
    if not isinstance(shape, ArgonneConfig) or family not in ARCHITECTURES:
        why = "llama.cpp has its GELU in another form" if family == "gpt2" else "it has no place in GGUF here"
        raise ArgonneError(f"model_type={family!r} cannot become GGUF: {why}; legal: {', '.join(ARCHITECTURES)}")
    if family == "qwen3" and (shape.attention_bias or shape.output_bias):
        raise ArgonneError("attention_bias=True of a Qwen3 cannot become GGUF; legal: False")
    if (scaling := shape.rope_scaling) is not None:
        unusual = [name for name in _UNUSUAL if getattr(scaling, name) is not None]
        if unusual or (scaling.rope_type == "llama3" and ARCHITECTURES[family] != "llama"):
            what = unusual[0] if unusual else "rope_type"
            value = getattr(scaling, what)
            raise ArgonneError(f"rope_scaling.{what}={value!r} of a {family} cannot become GGUF; legal: without it")
    dtype = model.tensors["model.embed_tokens.weight"].dtype
    if dtype not in _FILE_TYPES:
        raise ArgonneError(f"weights in {dtype} cannot become GGUF; legal: --dtype float32, float16 or bfloat16")
    return shape


def write_gguf(model: StoredModel, tokenizer: PreTrainedTokenizerFast, path: Path, name: str) -> None:
    """Write ``path``: weights in their dtype, vectors in float32, as llama.cpp wants them.

    Raises:
        ArgonneError: llama.cpp has no such model, or no such tokenizer.
    """
    gguf = require_gguf()
    shape, architecture = check_gguf(model), ARCHITECTURES[model.shape.family]
    words = gguf_tokenizer(tokenizer, shape.vocab_size)
    writer = gguf.GGUFWriter(None, architecture)
    _add_shape(writer, shape, name, _FILE_TYPES[model.tensors["model.embed_tokens.weight"].dtype])
    _add_tokenizer(writer, words)
    tensors = {_gguf_name(each): _as_gguf(each, tensor, shape, architecture) for each, tensor in model.tensors.items()}
    if shape.rope_scaling is not None and shape.rope_scaling.rope_type == "llama3":
        tensors["rope_freqs.weight"] = _divisors(shape)
    for each, tensor in tensors.items():
        # Bytes, as NumPy has no bfloat16.
        raw = None if tensor.dtype != torch.bfloat16 else gguf.GGMLQuantizationType.BF16
        size = (*tensor.shape[:-1], 2 * tensor.shape[-1]) if raw is not None else tensor.shape
        kind = np.dtype(np.uint8) if raw is not None else np.dtype(str(tensor.dtype).removeprefix("torch."))
        writer.add_tensor_info(each, size, kind, tensor.bytes, raw_dtype=raw)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors.values():
        value = tensor.load().contiguous()
        writer.write_tensor_data((value.view(torch.uint8) if value.dtype == torch.bfloat16 else value).numpy())
    writer.close()
    sync(path)


def _add_shape(writer: Any, shape: ArgonneConfig, name: str, file_type: int) -> None:
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(int(shape.head_dim))
    writer.add_value_length(int(shape.head_dim))
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_rope_dimension_count(int(shape.head_dim))
    writer.add_rope_freq_base(shape.rope_theta)
    if (scaling := shape.rope_scaling) is not None and scaling.rope_type != "llama3":
        gguf = require_gguf()
        writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
        writer.add_rope_scaling_factor(scaling.factor)
        if scaling.original_max_position_embeddings is not None:
            writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)


def _add_tokenizer(writer: Any, words: GGUFTokenizer) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.kinds)
    writer.add_token_merges(words.merges)
    for name, number in words.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_add_bos_token(words.adds["bos"])
    writer.add_add_eos_token(words.adds["eos"])
    if words.chat_template is not None:
        writer.add_chat_template(words.chat_template)


def _gguf_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, layer, rest = name.split(".", 3)
    inner, _, part = rest.rpartition(".")
    return f"blk.{layer}.{_BLOCK[inner]}.{part}"


def _as_gguf(name: str, tensor: Stored, shape: ArgonneConfig, architecture: str) -> Stored:
    """A tensor as llama.cpp stores it: vectors in float32, and of a Llama, rotated pairs side by side."""
    heads = {"q_proj": shape.num_attention_heads, "k_proj": shape.num_key_value_heads}.get(name.split(".")[-2])
    if heads is not None and architecture == "llama":
        tensor = replace(tensor, load=partial(_interleaved, tensor, heads))
    return tensor.to(torch.float32) if len(tensor.shape) == 1 else tensor


def _interleaved(stored: Stored, heads: int) -> Tensor:
    """Rows of a projection in llama.cpp's order: what rotates together is half a head apart here, neighbours there."""
    return rearrange(stored.load(), "(head half pair) ... -> (head pair half) ...", head=heads, half=2)


def _divisors(shape: ArgonneConfig) -> Stored:
    """What llama.cpp divides each rotary frequency by."""
    assert shape.rope_scaling is not None
    head_dim = int(shape.head_dim)
    slowed = shape.rope_scaling.frequencies(head_dim, shape.rope_theta)
    return Stored.of((rope_frequencies(head_dim, shape.rope_theta) / slowed).float())
