"""Argonne 1.x, which is GPT-2 with an exact GELU and an untied head: its shape, presets, and ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, NoReturn, get_args

from argonne.models.config import _LEFT_OUT, MOST_LAYERS, DerivedInt, check_shares
from argonne.models.contract import SpecialTokens
from argonne.models.families.file import ConfigFile
from argonne.parallel.communication.layout import Layout, require_divisible
from argonne.parallel.errors import ArgonneError, LayoutError
from argonne.parallel.legal import require_number, require_whole
from argonne.parallel.sharding.dropout import require_dropout

Activation = Literal["gelu", "gelu_new"]
"""The exact GELU, and GPT-2's own approximation of it by a tanh."""

DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")


@dataclass(frozen=True)
class Argonne1Config:
    """A GPT-2-type decoder: pre-norm LayerNorm, learned positions, multi-head attention, GELU, biases, dropout.

    Raises:
        ArgonneError: a field is out of range, or two do not go together.
    """

    family: ClassVar[str] = "gpt2"
    """The Hugging Face model_type that it is saved as."""

    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Transformer blocks."""
    num_attention_heads: int
    """Heads of queries, keys and values alike."""
    vocab_size: int
    """Tokens in the embedding and the head."""
    intermediate_size: int = _LEFT_OUT
    """Width of the feed-forward layer; left out: 4 * hidden_size."""
    max_position_embeddings: int = 2048
    """The positions that are learned: the longest sequence."""
    layer_norm_eps: float = 1e-5
    """Added to the variance in LayerNorm."""
    activation: Activation = "gelu"
    """What lies between the projections of the feed-forward layer."""
    embedding_dropout: float = 0.1
    """The share of what the first block is given that is dropped in training."""
    attention_dropout: float = 0.1
    """Of attention's probabilities."""
    residual_dropout: float = 0.1
    """Of what attention and feed-forward layers add to the residual stream."""
    tie_word_embeddings: bool = False
    """Whether the output head is the embedding."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings"):
            require_whole(field, getattr(self, field), 1)
        require_whole("num_hidden_layers", self.num_hidden_layers, 1, MOST_LAYERS)
        require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
        if self.intermediate_size is None or isinstance(self.intermediate_size, DerivedInt):
            object.__setattr__(self, "intermediate_size", DerivedInt(4 * self.hidden_size))
        require_whole("intermediate_size", self.intermediate_size, 1)
        for field in ("layer_norm_eps", "initializer_range"):
            require_number(field, getattr(self, field))
            object.__setattr__(self, field, float(getattr(self, field)))
        for field in DROPOUTS:
            require_dropout(field, getattr(self, field))
            object.__setattr__(self, field, float(getattr(self, field)))
        if self.activation not in get_args(Activation):
            legal = ", ".join(get_args(Activation))
            raise ArgonneError(f"activation={self.activation!r} is not legal; legal: {legal}")
        if not isinstance(self.tie_word_embeddings, bool):
            raise ArgonneError(f"tie_word_embeddings={self.tie_word_embeddings!r} is not legal; legal: True, False")

    def __deepcopy__(self, memo: dict[int, Any]) -> Argonne1Config:
        return self  # frozen; and what it derives stays derived

    def as_json(self) -> dict[str, Any]:
        """Its fields as JSON values, of which ``Argonne1Config(**...)`` makes it again."""
        return asdict(self)

    def with_flags(self, changed: Mapping[str, Any], block_size: int) -> Argonne1Config:
        """This shape with the fields that flags name, for sequences of ``block_size``; ``dropout`` is all three.

        Raises:
            ArgonneError: it has no such field, or learns fewer positions.
        """
        values = dict(changed)
        if "dropout" in values:
            require_dropout("dropout", values["dropout"])
            values |= dict.fromkeys(DROPOUTS, values.pop("dropout"))
        known = {field.name for field in fields(self)}
        for name in (name for name in values if name not in known):
            raise ArgonneError(f"{name}={values[name]!r} is not offered by Argonne 1.x (GPT-2); legal: leave it out")
        shape = replace(self, **values)
        if block_size > (learnt := shape.max_position_embeddings):
            raise ArgonneError(
                f"block_size={block_size} is more than max_position_embeddings={learnt}, the positions that this model "
                f"learns; legal: --block-size {learnt} or less, or --max-position-embeddings {block_size}"
            )
        return shape

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def drops(self) -> bool:
        """Whether anything is dropped in training."""
        return any(getattr(self, field) for field in DROPOUTS)

    def check_layout(self, layout: Layout) -> None:
        """Raise ``LayoutError`` unless every part of the model can be shared out as ``layout`` asks."""
        if layout.context > 1:
            raise LayoutError(
                f"context_parallel={layout.context} is not offered by Argonne 1.x (GPT-2), whose attention drops "
                "probabilities; legal: 1"
            )
        check_shares(self.num_attention_heads, self.intermediate_size, layout)

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, a tied head counted once (closed form)."""
        embeddings = self.vocab_size * (1 if self.tie_word_embeddings else 2) + self.max_position_embeddings
        return (
            embeddings * self.hidden_size + self.num_hidden_layers * self.block_parameter_count + 2 * self.hidden_size
        )

    @property
    def block_parameter_count(self) -> int:
        """Parameters of one block (closed form): four projections of attention, two of the other, two norms."""
        hidden, features = self.hidden_size, self.intermediate_size
        return 4 * hidden * (hidden + 1) + 2 * hidden * features + features + hidden + 4 * hidden

    def flops_per_token(self, sequence: int) -> float:
        """Forward and backward of one token: 6 a parameter of a matrix product, and causal attention (as of 2.x)."""
        looked_up = self.max_position_embeddings + (0 if self.tie_word_embeddings else self.vocab_size)
        attention = 6 * self.num_hidden_layers * self.hidden_size * sequence
        return 6 * (self.parameter_count - looked_up * self.hidden_size) + attention


PRESETS = {
    "argonne-1.0": Argonne1Config(1296, 12, 12, 12_000),
    "argonne-1.5": Argonne1Config(1296, 16, 16, 12_000),
}
"""275,827,680 and 356,516,640 parameters."""

_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "vocab_size": "vocab_size",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
    "layer_norm_eps": "layer_norm_epsilon",
    "activation": "activation_function",
    "embedding_dropout": "embd_pdrop",
    "attention_dropout": "attn_pdrop",
    "residual_dropout": "resid_pdrop",
    "tie_word_embeddings": "tie_word_embeddings",
    "initializer_range": "initializer_range",
}
"""What GPT2Config calls the fields."""
_ASSUMED: dict[str, Any] = {
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "vocab_size": 50_257,
    "n_inner": None,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
    "initializer_range": 0.02,
}
"""What GPT2Config assumes where a file is silent."""
_LEGAL: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu", "gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "reorder_and_upcast_attn": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
"""What some GPT-2 have and this family has not, or has in one way only: the values that mean no more than that."""


class Argonne1Family:
    """Models that ``transformers`` opens as ``GPT2LMHeadModel``; a ``Family``."""

    model_type = "gpt2"

    def read(self, file: ConfigFile) -> Argonne1Config:
        """The shape that a file describes; what it does not say is what ``GPT2Config`` assumes."""
        for name, values in _LEGAL.items():
            file.require(name, values)
        named = file.found.get("architectures") or []
        # The second is the first without its head, which is its embedding where the two are tied.
        if not isinstance(named, list) or (
            named and not any(each in named for each in ("GPT2LMHeadModel", "GPT2Model"))
        ):
            raise file.refusal("architectures", named, "['GPT2LMHeadModel'], ['GPT2Model']")
        said = {**_ASSUMED, **{name: file.found[name] for name in _ASSUMED if name in file.found}}
        if said["activation_function"] == "gelu_pytorch_tanh":  # the same function by another name
            said["activation_function"] = "gelu_new"
        try:
            return Argonne1Config(**{field: said[name] for field, name in _NAMES.items()})
        except ArgonneError as error:
            raise file.about(error) from None

    def write(self, config: Argonne1Config, special_tokens: SpecialTokens, dtype: str) -> dict[str, Any]:
        """The ``config.json`` of ``config``."""
        said = {name: getattr(config, field) for field, name in _NAMES.items()}
        if isinstance(config.intermediate_size, DerivedInt):
            said["n_inner"] = None
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.model_type,
            **said,
            "n_ctx": config.max_position_embeddings,  # its name before
            **{name: values[0] for name, values in _LEGAL.items() if values[0] is not None and name not in said},
            "dtype": dtype,
            "torch_dtype": dtype,
            "use_cache": True,
            "transformers_version": "5.0.0",
            **special_tokens,
        }

    def check(self, config: Argonne1Config) -> None:
        """Every ``Argonne1Config`` is one of the family."""


ARGONNE1 = Argonne1Family()


def require_not_reproducible() -> NoReturn:
    """Raise ``ArgonneError``: bits that no layout changes are asked for."""
    raise ArgonneError(
        "reproducible=True is not offered by Argonne 1.x (GPT-2), whose norms, biases and positions are not summed in "
        "blocks; legal: leave it out"
    )
