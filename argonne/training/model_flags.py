"""The flags of the model's shape: a preset or a file, and what is changed of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from argonne.checkpoint import require_intact
from argonne.models import ModelConfig, preset
from argonne.models.families import decoder_family, from_huggingface
from argonne.models.families.argonne1 import Argonne1Config
from argonne.parallel.errors import ArgonneError

DEFAULT_PRESET = "argonne-2.0-4.9b"


@dataclass(frozen=True)
class ModelFlags:
    """The model: a preset (or the config in its place), any field of which may be overridden."""

    preset: str | None = None
    """A named shape: demo, argonne-2.0-4.9b, argonne-2.0-2b, argonne-2.5-1b, argonne-2.0-8b, argonne-1.0 or
    argonne-1.5 [argonne-2.0-4.9b]."""
    model_config: Path | None = None
    """A Hugging Face config.json (or its directory) of a family that is known, to take the shape from, instead of a
    preset [the preset]."""
    family: str | None = None
    """What the model is saved as, and what it then has: llama, mistral, qwen2 (biases of queries, keys and values) or
    qwen3 (a norm of each head of queries and keys) [the preset's: llama; Argonne 1.x is gpt2]."""
    hidden_size: int | None = None
    """Width of the residual stream [the preset's]."""
    num_hidden_layers: int | None = None
    """Transformer blocks [the preset's]."""
    num_attention_heads: int | None = None
    """Query heads [the preset's]."""
    num_key_value_heads: int | None = None
    """Key-value heads [the preset's]."""
    head_dim: int | None = None
    """Width of a head [the preset's; hidden_size / num_attention_heads where one of these is given]."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer [the preset's; 8/3 of a given hidden_size, up to a multiple of 256]."""
    vocab_size: int | None = None
    """Tokens in the model; at least the tokenizer's [the preset's; the tokenizer's own for one trained here]."""
    rope_theta: float | None = None
    """Base of the rotary frequencies [the preset's]."""
    rms_norm_eps: float | None = None
    """Added to the mean square in RMSNorm [the preset's]."""
    tie_word_embeddings: bool | None = None
    """Whether the output head is the embedding [the preset's]."""
    initializer_range: float | None = None
    """Standard deviation of the initial weights [the preset's: 0.02 for demo and 1.x, hidden_size ** -0.5 for all
    others]."""
    attention_bias: bool | None = None
    """Whether the projections of attention have biases, of a family that leaves it open: llama, qwen3
    [the preset's; the family's: only in qwen2]."""
    max_position_embeddings: int | None = None
    """Of Argonne 1.x: the positions that are learned, at least --block-size [the preset's]."""
    dropout: float | None = None
    """Of Argonne 1.x: the share of vectors, of attention and of what layers add that is dropped in training
    [the preset's]."""
    init_from: Path | None = None
    """Begin with these weights, at step 0: a Hugging Face directory, or a run's (its newest valid checkpoint) or one of
    its step directories; the shape is its config.json's, and the tokenizer its own unless --tokenizer-path says
    otherwise [weights are drawn by --seed]."""
    resume_state: bool = False
    """Begin where the run was that left the weights of --init-from: at the step, with the tokens and at the place in
    the data that resume_state.json says there (convert.py --resume-state writes it of a file of the original)
    [at step 0, with the first row]."""

    def resolve(self, block_size: int) -> ModelConfig:
        """The whole shape. Raises ``ArgonneError`` naming what is not legal."""
        if self.preset is not None and self.model_config is not None:
            raise ArgonneError(
                f"preset={self.preset!r} conflicts with model_config={str(self.model_config)!r}; legal: one"
            )
        if self.model_config is not None:
            directory = self.model_config if self.model_config.is_dir() else self.model_config.parent
            require_intact(directory, lambda name: name == "config.json")
        base = from_huggingface(self.model_config) if self.model_config else preset(self.preset or DEFAULT_PRESET)
        changed: dict[str, Any] = {name: value for name, value in vars(self).items() if value is not None}
        for name in ("preset", "model_config", "init_from", "resume_state"):
            changed.pop(name, None)
        if isinstance(base, Argonne1Config):
            if self.model_config is not None and "hidden_size" in changed:
                changed = {"intermediate_size": None} | changed
            return base.with_flags(changed, block_size)
        for name in ("max_position_embeddings", "dropout"):
            if name in changed:
                raise ArgonneError(f"{name}={changed[name]!r} is not offered by this model; legal: leave it out")
        for name in ("family", "attention_bias"):
            changed.pop(name, None)
        if self.family is not None or self.attention_bias is not None:
            family = decoder_family(self.family or base.family)
            kept = base.attention_bias if family.model_type == base.family else None
            changed |= family.features(kept if self.attention_bias is None else self.attention_bias)
        if self.model_config is not None:  # a file gives what a preset derives, which is to follow a changed width too
            follows = {"hidden_size": ("head_dim", "intermediate_size"), "num_attention_heads": ("head_dim",)}
            changed = {name: None for given in follows if given in changed for name in follows[given]} | changed
        changed["max_position_embeddings"] = max(block_size, base.max_position_embeddings)
        return replace(base, **changed)
