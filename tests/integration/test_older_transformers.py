"""A checkpoint in transformers 4.57 itself: ids, special tokens and logits equal those of the version here.

Needs an interpreter that has it, named in ``ARGONNE_OLDER_PYTHON``:
``python -m venv /tmp/older && /tmp/older/bin/pip install 'transformers==4.57.*' torch``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from argonne.data import boundary_tokens, load_tokenizer
from argonne.data.tokens.byte_pair import AWKWARD
from argonne.models import ArgonneConfig, RopeScaling
from argonne.models.families import DECODERS, decoder_family
from tests.data.test_tokenizer_files import KINDS
from tests.export import export
from tests.qwen import qwen

OLDER = os.environ.get("ARGONNE_OLDER_PYTHON")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(OLDER is None, reason="needs ARGONNE_OLDER_PYTHON, an interpreter with transformers 4.57"),
]

SCALINGS = [
    RopeScaling("linear", 4.0),
    RopeScaling("llama3", 4.0, 8, low_freq_factor=1.0, high_freq_factor=4.0),
    RopeScaling("yarn", 4.0, 8),
]

OPEN = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer, model = AutoTokenizer.from_pretrained(sys.argv[1]), AutoModelForCausalLM.from_pretrained(sys.argv[1])
encoded = [tokenizer(text) for text in json.loads(sys.argv[2])]
with torch.no_grad():
    logits = model(torch.tensor([[1, 3, 2, 5]])).logits[0, -1]
names = ("bos_token_id", "eos_token_id", "pad_token_id")
print(json.dumps({
    "keys": [list(each) for each in encoded],
    "ids": [each["input_ids"] for each in encoded],
    "texts": [tokenizer.decode(each["input_ids"]) for each in encoded],
    "special": [getattr(of, name) for of in (tokenizer, model.generation_config, model.config) for name in names],
    "extra": tokenizer.all_special_tokens and sorted(set(tokenizer.all_special_tokens)),
    "template": tokenizer.chat_template,
    "settings": [tokenizer.model_max_length, tokenizer.padding_side, str(model.dtype)],
    "logits": logits.double().tolist(),
}))
"""


def opened(python: str, directory: Path) -> dict[str, Any]:
    words = [python, "-c", OPEN, str(directory), json.dumps(AWKWARD)]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=variables)
    assert done.returncode == 0, done.stderr
    assert "incorrect" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["qwen", *KINDS])
def test_transformers_4_opens_a_checkpoint_as_this_version_does(kind: str, tmp_path: Path) -> None:
    (qwen if kind == "qwen" else KINDS[kind])().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    boundary = None if kind == "prefix" else boundary_tokens(tokenizer)
    config = ArgonneConfig(24, 2, 4, 2, len(tokenizer) + 8, 40, max_position_embeddings=32)
    directory = export(tmp_path, config, tokenizer, boundary)
    assert OLDER is not None
    assert opened(OLDER, directory) == opened(sys.executable, directory)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("scaling", [None, *SCALINGS], ids=str)
def test_transformers_4_opens_every_family_with_every_rotation(
    family: str, scaling: RopeScaling | None, tmp_path: Path
) -> None:
    KINDS["own"]().save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    features = decoder_family(family).features(True if family in ("llama", "qwen3") else None)
    config = ArgonneConfig(24, 2, 4, 2, len(tokenizer) + 8, 40, max_position_embeddings=32, rope_scaling=scaling)
    directory = export(tmp_path, replace(config, **features), tokenizer, boundary_tokens(tokenizer))
    assert OLDER is not None
    old, new = opened(OLDER, directory), opened(sys.executable, directory)
    for name in ("special", "logits", "settings"):  # beside a Qwen2, 5 makes Qwen's tokenizer of any
        assert old[name] == new[name], name
