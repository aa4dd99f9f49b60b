"""Mistral: a Llama, as long as attention sees all that came before (no sliding window)."""

from argonne.models.families.decoder import DecoderFamily

MISTRAL = DecoderFamily(
    model_type="mistral",
    architecture="MistralForCausalLM",
    defaults={
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32_000,
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
    },
    silent={"sliding_window": 4096},
    writes={"sliding_window": None},
)
