"""Llama, which is what the Argonne 2.x architecture is too."""

from argonne.models.families.decoder import DecoderFamily

LLAMA = DecoderFamily(
    model_type="llama",
    architecture="LlamaForCausalLM",
    defaults={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32_000,
        "intermediate_size": 11_008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    attention_bias=None,
    output_bias=True,
    writes={"mlp_bias": False},
)
