"""A checkpoint's directory says what training decided, and other software goes by it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from argonne.models import end_tokens
from argonne.parallel import ArgonneError
from tests.data.test_tokenizer import words
from tests.integration.runs import MODEL, SCHEDULE, run, succeed
from tests.older_clients import FILES, require_accepted

TEXT = "a b c d e f g h i j k l"


def step(run: Path, number: int) -> Path:
    return run / f"step_{number:08d}"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that learns one document by heart; its tokenizer has boundary tokens, but under none of their titles."""
    root = tmp_path_factory.mktemp("learnt")
    pq.write_table(pa.table({"text": [TEXT] * 300}), root / "part-0.parquet")
    words("<|im_start|>", "<|im_end|>", *TEXT.split()).save_pretrained(root / "tokenizer")
    flags = {
        "--data-glob": root / "part-0.parquet",
        "--tokenizer-path": root / "tokenizer",
        "--vocab-size": 20,
        "--add-document-boundary-tokens": None,
        **MODEL,
        **SCHEDULE,
        "--total-steps": 60,
        "--learning-rate": 2e-2,
        "--save-interval": 30,
        "--output-dir": root / "run",
    }
    succeed("pretrain", {**flags, "--stop-at-step": 30}, nproc=1)
    # The original is gone: the rest is trained with the checkpoint's copy, which is to be the same tokenizer.
    shutil.rmtree(root / "tokenizer")
    succeed("resume", {"--checkpoint-path": root / "run"}, nproc=1)
    return root / "run"


def test_all_files_name_what_training_decided(learnt: Path) -> None:
    for number in (30, 60):
        directory = step(learnt, number)
        config, generation = read(directory / "config.json"), read(directory / "generation_config.json")
        tokenizer = AutoTokenizer.from_pretrained(directory)
        for name, token_id in {"bos": 1, "eos": 2, "pad": 2}.items():
            assert config[f"{name}_token_id"] == token_id
            assert generation[f"{name}_token_id"] == token_id
            assert getattr(tokenizer, f"{name}_token_id") == token_id
        assert config["max_position_embeddings"] == tokenizer.model_max_length == 32
        with safe_open(directory / "model-00001-of-00001.safetensors", "pt") as stored:
            kinds = {str(stored.get_tensor(name).dtype) for name in stored.keys()}  # noqa: SIM118
        assert kinds == {f"torch.{config['dtype']}"} == {f"torch.{config['torch_dtype']}"}
        require_accepted(directory)
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= FILES
    identities = [read(step(learnt, number) / "trainer.json")["identity"] for number in (30, 60)]
    assert identities[0] == identities[1]
    assert identities[0]["model"]["max_position_embeddings"] == 1024  # as in runs before


def test_generation_stops_at_the_eos_of_training_here_and_in_transformers(learnt: Path) -> None:
    greedy = {"--temperature": 0, "--max-new-tokens": 40, "--prompt": "a b c"}
    assert written({"--checkpoint-path": learnt, **greedy}) == [TEXT]
    directory = step(learnt, 60)
    tokenizer, model = AutoTokenizer.from_pretrained(directory), AutoModelForCausalLM.from_pretrained(directory)
    ids = tokenizer("a b c", return_tensors="pt")
    with torch.no_grad():
        whole = model.generate(**ids, max_new_tokens=40, do_sample=False)[0].tolist()
    assert tokenizer.decode(whole) == f"{TEXT} <|im_end|>"


def test_generation_stops_at_any_of_several_ends_that_a_directory_names(learnt: Path, tmp_path: Path) -> None:
    directory = as_plain(learnt, tmp_path)
    f = AutoTokenizer.from_pretrained(directory).convert_tokens_to_ids("f")
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [19, f]}))
    greedy = {"--temperature": 0, "--max-new-tokens": 40, "--prompt": "a b c"}
    assert written({"--checkpoint-path": directory, **greedy}) == ["a b c d e"]


def test_every_prompt_is_continued_with_draws_of_its_own(learnt: Path) -> None:
    """So hot that any token follows any other: the same prompt twice gives two texts."""
    hot = {"--temperature": 1e4, "--top-k": 0, "--top-p": 1, "--max-new-tokens": 40, "--prompt": ["a b", "a b"]}
    first, second = written({"--checkpoint-path": learnt, **hot})
    assert first != second


def test_generation_computes_in_the_precision_it_is_told(learnt: Path, tmp_path: Path) -> None:
    """With a norm so large that float16 has no number for what comes out of it."""
    directory = as_plain(learnt, tmp_path)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"] *= 1e6
    save_file(tensors, file, metadata={"format": "pt"})
    told = {"--checkpoint-path": directory, "--max-new-tokens": 1, "--prompt": "a b c"}
    succeed("generate", {**told, "--precision": "fp32"}, nproc=1)
    refused = run("generate", {**told, "--precision": "fp16"}, nproc=1)
    assert (refused.status, "logits are not finite" in refused.output) == (2, True), refused.output


def written(flags: dict[str, Any]) -> list[str]:
    """The lines of ``generate``, but that of its cache, which goes to standard error."""
    lines = [line.rstrip() for line in succeed("generate", flags, nproc=1).splitlines()]
    return [line for line in lines if not line.startswith("cache: ")]


def as_plain(learnt: Path, root: Path) -> Path:
    """A copy of the last step that is a Hugging Face directory, and no checkpoint of ours any more."""
    directory = root / "plain"
    shutil.copytree(step(learnt, 60), directory)
    (directory / "manifest.json").unlink()
    (directory / "model-00001-of-00001.safetensors").rename(directory / "model.safetensors")
    (directory / "model.safetensors.index.json").unlink()
    return directory


def test_the_ends_of_a_text_are_those_of_both_files(tmp_path: Path) -> None:
    assert end_tokens(tmp_path) == set()
    (tmp_path / "config.json").write_text('{"eos_token_id": 2}')
    assert end_tokens(tmp_path) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert end_tokens(tmp_path) == {2, 7, 9}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert end_tokens(tmp_path) == {2}


@pytest.mark.parametrize("value", ['"</s>"', "[1, null]", "true", "2.0", "{}"])
def test_an_end_that_is_no_id_is_refused(value: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {value}}}')
    with pytest.raises(ArgonneError, match="eos_token_id=.* is not legal; legal: an id, a list of ids or null"):
        end_tokens(tmp_path)


def test_without_boundary_tokens_the_tokenizers_own_stand(uninterrupted: Path) -> None:
    directory = step(uninterrupted, 12)
    require_accepted(directory)
    require_accepted(Path(read(uninterrupted / "run.json")["flags"]["data"]["tokenizer_path"]))
    own = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    assert read(directory / "generation_config.json") == own
    assert own.items() <= read(directory / "config.json").items()
