"""What Llama-type families have in common: how a ``config.json`` becomes an ``ArgonneConfig``, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from argonne.models.config import ArgonneConfig
from argonne.models.contract import SpecialTokens
from argonne.models.families.file import ConfigFile
from argonne.models.families.rope import read_rope, written_rope
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number, require_whole


class Family(Protocol):
    """Models that Hugging Face calls by one ``model_type``."""

    @property
    def model_type(self) -> str:
        """The name in ``config.json``."""

    def read(self, file: ConfigFile) -> Any:
        """The configuration that a file describes. Raises ``ArgonneError`` for what the family here does not have."""

    def write(self, config: Any, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """The ``config.json`` with which ``transformers`` (4.57 and 5) opens the weights."""

    def check(self, config: Any) -> None:
        """Raise ``ArgonneError`` if ``config`` has what no model of the family has, or lacks what all have."""


SHARED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "intermediate_size",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
    "initializer_range",
)
"""What ``ArgonneConfig`` and all these families call by the same name."""

_LEGAL: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "mlp_bias": (False,),
    "attention_dropout": (0.0, None),
    "partial_rotary_factor": (1.0, None),
    "sliding_window": (None,),
    "use_sliding_window": (False, None),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "use_mrope": (False, None),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
    "n_routed_experts": (0, None),
    "num_nextn_predict_layers": (0, None),
    "use_qk_norm": (False, None),
    "qkv_bias": (False, None),
    "clip_qkv": (None,),
    "logits_scaling": (1.0, None),
    "logit_scale": (1.0, None),
    "embedding_multiplier": (1.0, None),
    "residual_multiplier": (1.0, None),
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "quantization_config": (None,),
}
"""What some models have and none of these families, or have in one way only: the values that mean no more than that."""


@dataclass(frozen=True)
class DecoderFamily:
    """A family of ``ArgonneConfig``. A file of this room has one, and says nothing else."""

    model_type: str
    architecture: str
    """The class of ``transformers`` that opens it."""
    defaults: Mapping[str, Any]
    """What the family's class of configurations assumes where a file is silent. Without ``head_dim`` it follows from
    other fields; without ``num_key_value_heads`` there are as many as query heads."""
    attention_bias: bool | None = False
    """Whether queries, keys and values have biases; None: as the field ``attention_bias`` says."""
    output_bias: bool = False
    """Whether the projection out of attention has one where they do."""
    qk_norm: bool = False
    """Whether each head of queries and keys has an RMSNorm."""
    unread: frozenset[str] = frozenset()
    """Fields that mean something in other families."""
    silent: Mapping[str, Any] = field(default_factory=dict)
    """What is assumed of a field that has few legal values where a file is silent, if that is none of them."""
    writes: Mapping[str, Any] = field(default_factory=dict)
    """What a file says besides the shape."""
    knows_head_dim: bool = True
    """Whether its class of configurations has a ``head_dim``; else one is written only where it does not follow."""

    def features(self, attention_bias: bool | None = None) -> dict[str, Any]:
        """The fields of ``ArgonneConfig`` by which the families differ, with or without biases in attention.

        Raises:
            ArgonneError: the family always has biases, or never.
        """
        bias = bool(self.attention_bias) if attention_bias is None else attention_bias
        if self.attention_bias is not None and bias != self.attention_bias:
            raise ArgonneError(
                f"attention_bias={bias} is not offered by family={self.model_type!r}; legal: {self.attention_bias}"
            )
        return {
            "family": self.model_type,
            "attention_bias": bias,
            "output_bias": bias and self.output_bias,
            "qk_norm": self.qk_norm,
        }

    def check(self, config: ArgonneConfig) -> None:
        """Raise ``ArgonneError`` if ``config`` has what no model of the family has, or lacks what all have."""
        for name, value in self.features(config.attention_bias).items():
            if getattr(config, name) != value:
                raise ArgonneError(
                    f"{name}={getattr(config, name)} is not offered by family={self.model_type!r} with "
                    f"attention_bias={config.attention_bias}; legal: {value}"
                )

    def read(self, file: ConfigFile) -> ArgonneConfig:
        """The shape that a file describes: what it does not say is what the family's configuration class assumes."""
        self._require_plain(file)
        derived = ["num_key_value_heads", *(["head_dim"] if "head_dim" not in self.defaults else [])]
        known = dict(self.defaults) | {name: file.found[name] for name in SHARED if name in file.found}
        for name in [name for name in derived if known.get(name) is None]:
            known.pop(name, None)  # null means that it follows from others
        known.setdefault("num_key_value_heads", known["num_attention_heads"])
        theta, scaling = read_rope(file, known["max_position_embeddings"])
        try:
            for name in {"intermediate_size", "head_dim"} & set(known):
                require_whole(name, known[name], 1)  # null would ask for a rule of ours
            require_number("initializer_range", known["initializer_range"])
            bias = file.found.get("attention_bias") if self.attention_bias is None else None
            return ArgonneConfig(**known, rope_theta=theta, rope_scaling=scaling, **self.features(bias))
        except ArgonneError as error:
            raise file.about(error) from None

    def write(self, config: ArgonneConfig, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """The ``config.json`` of ``config``. Raises ``ArgonneError`` as ``check`` does."""
        self.check(config)
        shape = {name: getattr(config, name) for name in SHARED}
        if not self.knows_head_dim and config.head_dim * config.num_attention_heads == config.hidden_size:
            del shape["head_dim"]
        bias = {"attention_bias": config.attention_bias} if self.attention_bias is None else {}
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "hidden_act": "silu",
            **bias,
            **self.writes,
            **shape,
            **written_rope(config),
            "attention_dropout": 0.0,
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
            # Of this form, not of the library here. Without it, 4.57 takes a large vocabulary for Mistral's faulty one.
            "transformers_version": "5.0.0",
            **special_tokens,
        }

    def _require_plain(self, file: ConfigFile) -> None:
        """Refuse a file that asks for what the family here does not have."""
        own = (True, False) if self.attention_bias is None else (self.attention_bias, None)
        assumed = {**self.silent, **file.found}
        for name, values in {**_LEGAL, "attention_bias": own}.items():
            if name not in self.unread:
                file.require(name, values, name if name in file.found else f"{name} (left out)", assumed)
        layers = file.found.get("layer_types")
        if layers is not None and (not isinstance(layers, list) or any(kind != "full_attention" for kind in layers)):
            raise file.refusal("layer_types", layers, "'full_attention' for every layer")
        named = file.found.get("architectures") or []
        if not isinstance(named, list) or (
            named and not any(str(name).lower().endswith("forcausallm") for name in named)
        ):
            raise file.refusal("architectures", named, repr([self.architecture]))
