"""A run that begins with another model's weights: what it trains, what identifies it, and what its checkpoints keep."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from argonne.data import load_tokenizer
from argonne.parallel import ArgonneError
from argonne.training.config import ModelFlags, RunConfig
from argonne.training.run.checks import check
from argonne.training.run.corpora import Corpora
from argonne.training.run.resume import parse_resume, resume
from argonne.training.run.workflow import pretrain
from tests.integration.runs import history, metrics, weights
from tests.training.small_run import small_run

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_origin(directory: Path, tokenizer: Path, seed: int = 3) -> Path:
    """A Llama with a head of its own, and with what checkpoints of real models have beside the weights."""
    torch.manual_seed(seed)
    loaded = load_tokenizer(tokenizer)
    config = LlamaConfig(
        vocab_size=len(loaded) + 5,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5e4},
        tie_word_embeddings=False,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=[2, 3],
        pad_token_id=None,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(directory, max_shard_size="20KB")
    loaded.chat_template = TEMPLATE
    loaded.save_pretrained(directory)
    said = json.loads((directory / "config.json").read_text())
    said |= {"torch_dtype": said.pop("dtype", "bfloat16"), "a_field": {"of": ["a", "later", "version"]}}
    (directory / "config.json").write_text(json.dumps(said, indent=1))
    said = {"temperature": 0.6, "do_sample": True, "eos_token_id": [2, 3], "of_no_library": None}
    (directory / "generation_config.json").write_text(json.dumps(said))
    (directory / "vocab.json").write_text('{ "kept": 1 }')
    (directory / "README.md").write_text("not a part of the model")
    return directory


NOT_KEPT = ("config.json", "model.safetensors.index.json", "README.md")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("init_from")


@pytest.fixture(scope="module")
def config(home: Path) -> RunConfig:
    """Four steps from there on, saved at each second."""
    base = small_run(home)
    origin = write_origin(home / "origin", home / "tokenizer")
    return replace(base, model=ModelFlags(init_from=origin), data=replace(base.data, tokenizer_path=None))


def begin(config: RunConfig) -> None:
    check(config, 1)
    assert pretrain(config) == 0


def into(config: RunConfig, directory: Path, stop: int | None = None) -> RunConfig:
    return replace(config, run=replace(config.run, output_dir=directory, stop_at_step=stop))


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    begin(config)
    return config.run.output_dir


def test_the_first_loss_is_that_of_the_weights_in_transformers(config: RunConfig, whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(config.model.init_from, dtype=torch.float32)
    corpora = Corpora.open(config.data, config.training.seed)
    tokenizer = load_tokenizer(str(config.model.init_from))
    mixture = corpora.mixture(tokenizer, None, range(corpora.lanes), {})
    ids = torch.stack([torch.from_numpy(mixture.sample(number).tokens).long() for number in range(4)])
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
    assert metrics(whole)[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_keeps_every_field_and_file_that_training_did_not_change(config: RunConfig, whole: Path) -> None:
    origin = config.model.init_from
    assert origin is not None
    for step in ("step_00000002", "step_00000004"):
        told, kept = (json.loads((path / "config.json").read_text()) for path in (origin, whole / step))
        assert list(kept) == list(told)
        assert kept == told | {"torch_dtype": "float32"}
        files = {path.name for path in (whole / step).iterdir()}
        for path in origin.iterdir():
            if path.suffix == ".safetensors" or path.name in NOT_KEPT:
                continue
            assert (whole / step / path.name).read_bytes() == path.read_bytes(), path.name
        assert "README.md" not in files
    assert AutoTokenizer.from_pretrained(whole / step).chat_template == TEMPLATE
    assert not (whole / "tokenizer").exists()
    names = {name for name in weights(whole) if not name.endswith(("exp_avg", "exp_avg_sq"))}
    assert names == {name for file in origin.glob("*.safetensors") for name in load_file(file)}


def test_a_run_goes_on_without_the_directory_it_began_with(
    config: RunConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = shutil.copytree(str(config.model.init_from), tmp_path / "origin")
    moved = replace(into(config, tmp_path / "run", 2), model=ModelFlags(init_from=origin))
    assert pretrain(moved) == 0
    shutil.rmtree(origin)
    moved = into(moved, tmp_path / "run")
    resumed = shutil.copytree(tmp_path / "run", tmp_path / "resumed")
    check(moved, 1)
    assert pretrain(moved) == 0
    assert "changed from here on" not in capsys.readouterr().out
    flags = parse_resume(["--checkpoint-path", str(resumed)])
    assert resume(replace(flags, run=replace(flags.run, output_dir=resumed))) == 0
    for run in (tmp_path / "run", resumed):
        assert history(run) == history(whole)
        assert weights(run) == weights(whole)
        for file in (whole / "step_00000004").iterdir():
            if file.suffix != ".safetensors" and file.name not in ("trainer.json", "manifest.json"):
                assert (run / "step_00000004" / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_run_killed_before_its_first_save_begins_again(config: RunConfig, whole: Path, tmp_path: Path) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    for step in run.glob("step_*"):
        shutil.rmtree(step)
    check(into(config, run), 1)
    assert pretrain(into(config, run)) == 0
    assert history(run) == history(whole)
    assert weights(run) == weights(whole)


def test_another_beginning_is_another_run(config: RunConfig, whole: Path, tmp_path: Path) -> None:
    other = write_origin(tmp_path / "other", config.run.output_dir.parent / "tokenizer", seed=4)
    same = shutil.copytree(str(config.model.init_from), tmp_path / "same")
    run = shutil.copytree(whole, tmp_path / "run")
    for without in (False, True):  # a checkpoint
        asked = replace(into(config, run), model=ModelFlags(init_from=other))
        with pytest.raises(ArgonneError, match=r"holds a different run \(init_from: \w+\.\.\.\w+ -> \w+"):
            pretrain(asked)
        assert pretrain(replace(asked, model=ModelFlags(init_from=same))) == 0
        scratch = replace(config.data, tokenizer_path=same)
        with pytest.raises(ArgonneError, match=r"holds a different run \(init_from: \w+\.\.\.\w+ -> null"):
            pretrain(replace(into(config, run), model=ModelFlags(model_config=same), data=scratch))
        for step in run.glob("step_*") if not without else ():
            shutil.rmtree(step)
    with pytest.raises(ArgonneError, match="does not exist"):
        check(replace(into(config, run), model=ModelFlags(init_from=tmp_path / "gone")), 1)


def test_a_run_begins_with_the_newest_valid_checkpoint_of_another(
    config: RunConfig, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(whole, tmp_path / "other")
    (run / "step_00000004" / "model-00001-of-00001.safetensors").write_bytes(b"no")
    asked = replace(into(config, tmp_path / "run", 1), model=ModelFlags(init_from=run))
    check(asked, 1)
    assert pretrain(asked) == 0
    printed = capsys.readouterr().out
    assert "checkpoint step_00000004 is damaged and was passed over" in printed
    assert f"beginning with the weights of {run / 'step_00000002'}" in printed
    named = replace(into(config, tmp_path / "named", 1), model=ModelFlags(init_from=run / "step_00000002"))
    assert pretrain(named) == 0
    assert history(tmp_path / "named") == history(tmp_path / "run")
    with pytest.raises(ArgonneError, match="is damaged|holds no valid checkpoint"):
        pretrain(replace(into(config, tmp_path / "bad"), model=ModelFlags(init_from=run / "step_00000004")))
    assert not (tmp_path / "bad").exists()


def test_another_tokenizer_brings_its_files_and_its_ids(config: RunConfig, home: Path, tmp_path: Path) -> None:
    other = home / "another"
    asked = replace(into(config, tmp_path / "run"), data=replace(config.data, tokenizer_path=other))
    check(asked, 1)
    for stop in (2, None):  # begun, and continued from a checkpoint
        assert pretrain(into(asked, tmp_path / "run", stop)) == 0
    kept = tmp_path / "run" / "step_00000004"
    for file in other.iterdir():
        assert (kept / file.name).read_bytes() == file.read_bytes(), file.name
    assert not (kept / "chat_template.jinja").exists()
    for name in ("config.json", "generation_config.json"):
        told = json.loads((kept / name).read_text())
        assert (told["bos_token_id"], told["eos_token_id"], told["pad_token_id"]) == (0, 2, 1), name
    assert json.loads((kept / "generation_config.json").read_text())["temperature"] == 0.6


def edited(**fields: Any) -> Callable[[Path], Any]:
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def quantised(path: Path) -> None:
    tensors = load_file(path)
    save_file({name: tensor.to(torch.int8) for name, tensor in tensors.items()}, path)


REFUSED: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "no config": ("config.json", Path.unlink, "holds no checkpoint|does not exist"),
    "config is no JSON": ("config.json", lambda path: path.write_text("{"), "config.json.* cannot be read"),
    "config of another kind": ("config.json", edited(model_type="bert"), "model_type='bert'"),
    "generation config is no JSON": ("generation_config.json", lambda path: path.write_text("["), "cannot be read"),
    "generation config is no object": ("generation_config.json", lambda path: path.write_text("[]"), "cannot be read"),
    "truncated weights": (
        "model.safetensors",
        lambda path: path.write_bytes(path.read_bytes()[:-90]),
        "cannot be read",
    ),
    "weights are missing": ("model.safetensors", Path.unlink, "holds no safetensors"),
    "quantised weights": ("model.safetensors", quantised, "is stored as I8; legal: F16"),
    "tokenizer is no JSON": ("tokenizer.json", lambda path: path.write_text("{}"), "cannot be loaded"),
    "no tokenizer": ("tokenizer.json", Path.unlink, "holds no tokenizer; legal: --tokenizer-path too"),
    "fewer rows than tokens": ("config.json", edited(vocab_size=9), "more than the model of init_from"),
    "other shapes than said": ("config.json", edited(intermediate_size=35), "has shape"),
    "more layers than stored": ("config.json", edited(num_hidden_layers=3), "has no tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_cannot_begin_with_is_refused_in_one_line(config: RunConfig, tmp_path: Path, name: str) -> None:
    file, change, message = REFUSED[name]
    origin = tmp_path / "origin"
    origin.mkdir()
    for path in Path(str(config.model.init_from)).iterdir():
        if path.suffix != ".safetensors" and path.name not in ("model.safetensors.index.json", "vocab.json"):
            shutil.copy(path, origin)
    stored = {
        k: v for path in Path(str(config.model.init_from)).glob("*.safetensors") for k, v in load_file(path).items()
    }
    save_file(stored, origin / "model.safetensors")
    change(origin / file)
    asked = replace(into(config, tmp_path / "run"), model=ModelFlags(init_from=origin))
    with pytest.raises(ArgonneError, match=message) as refusal:
        begin(asked)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"hidden_size": 32}, r"hidden_size=32 contradicts init_from='.*', which has 24; legal: leave it out"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings=True contradicts init_from='.*', which has False"),
        ({"preset": "demo"}, r"preset='demo' contradicts init_from='.*' \(hidden_size: 256, not 24\)"),
        ({"preset": "none"}, "preset='none' is not known"),
    ],
)
def test_flags_of_another_shape_are_refused(config: RunConfig, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgonneError, match=message):
        check(replace(into(config, config.run.output_dir / "new"), model=replace(config.model, **flags)), 1)


def test_flags_of_the_same_shape_are_not(config: RunConfig, tmp_path: Path) -> None:
    same = replace(config.model, num_hidden_layers=2, rope_theta=5e4, model_config=config.model.init_from)
    check(replace(into(config, tmp_path / "run"), model=same), 1)


def test_a_block_size_past_the_positions_is_refused(config: RunConfig, tmp_path: Path) -> None:
    asked = replace(into(config, tmp_path / "run"), data=replace(config.data, block_size=65))
    with pytest.raises(ArgonneError, match=r"block_size=65 is more than .* can see; legal: 1 to 64"):
        check(asked, 1)
    check(replace(asked, data=replace(config.data, block_size=64)), 1)


@pytest.mark.parametrize(
    ("name", "message"), [("gone", "does not exist"), ("file", "is a file"), ("empty", "holds no")]
)
def test_what_is_no_directory_of_a_model_is_refused(config: RunConfig, tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("{}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArgonneError, match=message):
        check(replace(into(config, tmp_path / "run"), model=ModelFlags(init_from=tmp_path / name)), 1)
