"""The shape of a Llama-type model, the named presets of Argonne 2.x and what makes a shape legal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from argonne.models.rope import RopeScaling
from argonne.parallel.communication.layout import Layout, divisors, require_divisible
from argonne.parallel.errors import ArgonneError, LayoutError
from argonne.parallel.legal import require_number, require_whole

MOST_LAYERS = 1 << 16
"""More blocks than any model has; what asks for more is a mistake."""

_LEFT_OUT: Any = None
"""The default of a field that is derived from others: to whoever reads it, it is a number."""


class DerivedInt(int):
    """A whole number that ``ArgonneConfig`` has derived. It says so, and a config that is given one derives its own.

    In ``dataclasses.asdict``, which copies, it is a plain number.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> int:
        return int(self)


class DerivedFloat(float):
    """The same for a number that is not whole."""

    def __deepcopy__(self, memo: dict[int, Any]) -> float:
        return float(self)


@dataclass(frozen=True)
class ArgonneConfig:
    """A Llama-type decoder: pre-norm RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    What is left out (or None) is derived from other fields, and derived anew by ``dataclasses.replace`` when these
    change. To keep a derived number while they do, give it as one of its own: ``head_dim=int(config.head_dim)``.

    Raises:
        ArgonneError: a field is out of range, or two do not go together.
    """

    hidden_size: int
    """Width of the residual stream."""
    num_hidden_layers: int
    """Transformer blocks."""
    num_attention_heads: int
    """Query heads."""
    num_key_value_heads: int
    """Key-value heads; query head i uses key-value head i // (query heads / key-value heads)."""
    vocab_size: int
    """Tokens in the embedding and the head."""
    intermediate_size: int = _LEFT_OUT
    """Width of the feed-forward layer; left out: ``feed_forward_size(hidden_size)``."""
    head_dim: int = _LEFT_OUT
    """Width of a head; left out: hidden_size / num_attention_heads."""
    max_position_embeddings: int = 4096
    """The longest sequence."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in RMSNorm."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    tie_word_embeddings: bool = True
    """Whether the output head is the embedding."""
    initializer_range: float = _LEFT_OUT
    """Standard deviation of the initial weights; left out: hidden_size ** -0.5. Projections into the
    residual stream begin smaller by sqrt(2 * num_hidden_layers)."""
    family: str = "llama"
    """The Hugging Face ``model_type`` that it is saved as (``argonne.models.families``), which must have the rest."""
    attention_bias: bool = False
    """Whether the projections to queries, keys and values have biases."""
    output_bias: bool = False
    """Whether the projection out of attention has one."""
    qk_norm: bool = False
    """Whether each head of queries and keys goes through an RMSNorm, before it is turned."""
    rope_scaling: RopeScaling | None = None
    """How the rotary frequencies are stretched; also a mapping with the fields of one."""

    def __post_init__(self) -> None:
        for field in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size"):
            require_whole(field, getattr(self, field), 1)
        require_whole("num_hidden_layers", self.num_hidden_layers, 1, MOST_LAYERS)
        require_whole("max_position_embeddings", self.max_position_embeddings, 1)
        for field in ("rms_norm_eps", "rope_theta"):
            require_number(field, getattr(self, field))
            object.__setattr__(self, field, float(getattr(self, field)))
        for field in ("tie_word_embeddings", "attention_bias", "output_bias", "qk_norm"):
            if not isinstance(getattr(self, field), bool):
                raise ArgonneError(f"{field}={getattr(self, field)!r} is not legal; legal: True, False")
        require_divisible(
            "num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads
        )
        self._derive()
        if self.head_dim % 2:
            raise ArgonneError(f"head_dim={self.head_dim} is odd; rotary positions rotate pairs, legal: even numbers")
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ArgonneError(f"rope_scaling={self.rope_scaling!r} is not legal; legal: a RopeScaling, or None")
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ArgonneError(f"rope_theta={self.rope_theta} is not legal with yarn; legal: more than 1")

    def as_json(self) -> dict[str, Any]:
        """Its fields as JSON values, of which ``ArgonneConfig(**...)`` makes it again.

        Without those that a plain Llama has no use for: models were the same before there were fields for them.
        """
        found = dataclasses.asdict(self)
        if self.rope_scaling is not None:
            found["rope_scaling"] = self.rope_scaling.as_json()
        return {name: value for name, value in found.items() if name not in _PLAIN or value != _PLAIN[name]}

    def __deepcopy__(self, memo: dict[int, Any]) -> ArgonneConfig:
        return self  # frozen; and what it derives stays derived

    def _derive(self) -> None:
        """Fill in what is left out, and check what is given in its place."""
        if self._is_left_out("head_dim"):
            require_divisible("hidden_size", self.hidden_size, "num_attention_heads", self.num_attention_heads)
            object.__setattr__(self, "head_dim", DerivedInt(self.hidden_size // self.num_attention_heads))
        if self._is_left_out("intermediate_size"):
            object.__setattr__(self, "intermediate_size", DerivedInt(feed_forward_size(self.hidden_size)))
        for field in ("head_dim", "intermediate_size"):
            require_whole(field, getattr(self, field), 1)
        if self._is_left_out("initializer_range"):
            object.__setattr__(self, "initializer_range", DerivedFloat(self.hidden_size**-0.5))
            return
        require_number("initializer_range", self.initializer_range)
        object.__setattr__(self, "initializer_range", float(self.initializer_range))

    def _is_left_out(self, field: str) -> bool:
        """Whether ``field`` follows from others: not given, or handed on as ``replace`` found it derived."""
        value = getattr(self, field)
        return value is None or isinstance(value, DerivedInt | DerivedFloat)

    def check_layout(self, layout: Layout) -> None:
        """Raise ``LayoutError`` unless every part of the model can be shared out as ``layout`` asks."""
        check_shares(self.num_attention_heads, self.intermediate_size, layout)

    def blocks_of_head(self, blocks: int | None) -> int:
        """How many of so many canonical blocks of query heads share a key-value head; 1 where none are shared.

        Blocks that are parts of heads share none either.
        """
        sharing, left = divmod(blocks or 1, self.num_key_value_heads)
        is_subtree = sharing.bit_count() == 1 or sharing == blocks
        return (
            sharing if sharing > 1 and not left and is_subtree and not self.num_attention_heads % (blocks or 1) else 1
        )

    @property
    def parameter_count(self) -> int:
        """Parameters of the whole model, a tied head counted once (closed form)."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * self.block_parameter_count + self.hidden_size

    @property
    def block_parameter_count(self) -> int:
        """Parameters of one block (closed form)."""
        query = self.num_attention_heads * self.head_dim
        key_value = self.num_key_value_heads * self.head_dim
        attention = self.hidden_size * (2 * query + 2 * key_value)
        attention += (query + 2 * key_value) * self.attention_bias + self.hidden_size * self.output_bias
        attention += 2 * self.head_dim * self.qk_norm
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    def flops_per_token(self, sequence: int) -> float:
        """Forward and backward of one token: 6 a parameter of a matrix product, and causal attention.

        Attention: 2 products (scores, values) of 2 FLOP x heads x head_dim x sequence / 2 each, times 3 for
        forward and backward.
        """
        embedding = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        attention = 6 * self.num_hidden_layers * self.num_attention_heads * self.head_dim * sequence
        return 6 * (self.parameter_count - embedding) + attention


def check_shares(num_attention_heads: int, intermediate_size: int, layout: Layout) -> None:
    """Raise ``LayoutError`` unless heads and features of a model can be shared out over tensor-parallel ranks."""
    tensor = layout.tensor
    shared = {"num_attention_heads": num_attention_heads, "intermediate_size": intermediate_size}
    if layout.uneven_shards:
        for field, value in shared.items():
            if value < tensor:
                raise LayoutError(f"{field}={value} is less than tensor_parallel={tensor}; legal sizes: 1 to {value}")
        return
    legal = [t for t in divisors(num_attention_heads) if intermediate_size % t == 0]
    if tensor not in legal:
        field = next(field for field, value in shared.items() if value % tensor)
        listed = ", ".join(str(size) for size in legal)
        raise LayoutError(
            f"{field}={shared[field]} is not divisible by tensor_parallel={tensor}; legal sizes: {listed} "
            "(or uneven_shards, which gives some ranks one more than others)"
        )


_PLAIN: dict[str, Any] = {
    field.name: field.default
    for field in dataclasses.fields(ArgonneConfig)
    if field.name in ("family", "attention_bias", "output_bias", "qk_norm", "rope_scaling")
}
"""What a plain Llama is in the fields that older runs do not have."""


def feed_forward_size(hidden_size: int) -> int:
    """The 2.x rule: 8/3 of the hidden size, rounded up to a multiple of 256."""
    return -(-int(8 * hidden_size / 3) // 256) * 256


PRESETS = {
    # A few minutes on a laptop; its vocabulary is that of the tokenizer trained on the data.
    "demo": ArgonneConfig(256, 4, 8, 4, 12_000, max_position_embeddings=1024, initializer_range=0.02),
    "argonne-2.0-4.9b": ArgonneConfig(4080, 24, 24, 8, 151_665),
    "argonne-2.0-2b": ArgonneConfig(3072, 20, 24, 4, 151_665),
    "argonne-2.5-1b": ArgonneConfig(2048, 16, 16, 8, 151_936),
    # Named 8B by its authors; these dimensions make 16,970,470,400 parameters.
    "argonne-2.0-8b": ArgonneConfig(5120, 56, 40, 8, 151_936, tie_word_embeddings=False),
}
"""Those of ``models/build.py`` that are of this type."""
