"""Qwen2 and 2.5: a Llama with biases of queries, keys and values, and none of what they make."""

from argonne.models.families.decoder import DecoderFamily

QWEN2 = DecoderFamily(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    defaults={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 151_936,
        "intermediate_size": 22_016,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    attention_bias=True,
    unread=frozenset({"sliding_window"}),  # without use_sliding_window
    writes={"use_sliding_window": False},
    knows_head_dim=False,
)
