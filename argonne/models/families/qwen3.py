"""Qwen3: a Llama with a norm of each head of queries and keys, and heads of a width of their own."""

from argonne.models.families.decoder import DecoderFamily

QWEN3 = DecoderFamily(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    attention_bias=None,
    output_bias=True,
    qk_norm=True,
    unread=frozenset({"sliding_window"}),  # without use_sliding_window
    writes={"use_sliding_window": False},
)
