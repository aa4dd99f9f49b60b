"""``pretrain(config, model=...)`` in this very process: what it trains, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from argonne.checkpoint import load_trainer
from argonne.models import Batch, CrossEntropyLoss, Execution, LanguageModel, build_replicas, from_huggingface
from argonne.parallel import ArgonneError, Layout, LayoutError, Precision, ProcessGroups, regions_of
from argonne.parallel.communication.reduction import sum_over
from argonne.training.config import ModelFlags, RunConfig, names_of
from argonne.training.optimizer import build_optimizer
from argonne.training.run.checks import check
from argonne.training.run.model import own_model
from argonne.training.run.workflow import pretrain
from argonne.training.step import Learner, train_step
from tests.integration.runs import history, weights
from tests.models.own import VOCABULARY, Small, Staged, Unstaged
from tests.pool import RankPool
from tests.training.small_run import small_run
from tests.whole import Parts, assemble, assert_close

DOUBLE = Precision(torch.float64, torch.float64)


def build(execution: Execution, vocabulary: int, hidden: int = 8) -> LanguageModel:
    return Small(execution, vocabulary, hidden)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    found = small_run(tmp_path_factory.mktemp("own"))
    return replace(found, model=ModelFlags())


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> Path:
    """The four steps of a run."""
    assert pretrain(config, build) == 0
    return config.run.output_dir


def refusal(config: RunConfig, model: Any) -> str:
    with pytest.raises(ArgonneError) as error:
        pretrain(config, model)
    assert "\n" not in str(error.value)
    return str(error.value)


def elsewhere(config: RunConfig, directory: Path, **run: Any) -> RunConfig:
    return replace(config, run=replace(config.run, output_dir=directory, **run))


def test_a_run_that_is_stopped_and_continued_is_the_undisturbed_one(
    config: RunConfig, whole: Path, tmp_path: Path
) -> None:
    assert pretrain(elsewhere(config, tmp_path, stop_at_step=2), build) == 0
    assert len(history(tmp_path)) == 2
    assert pretrain(elsewhere(config, tmp_path), build) == 0
    assert history(tmp_path) == history(whole)
    assert weights(tmp_path) == weights(whole)


def test_a_checkpoint_has_the_models_own_tensors_and_says_what_it_is(whole: Path) -> None:
    names = {"embed.weight", "blocks.0.up.weight", "blocks.0.down.weight", "norm.weight", "norm.bias", "head.weight"}
    assert {name for name in weights(whole) if ".exp_avg" not in name} == names
    last = sorted(whole.glob("step_*"))[-1]
    written = json.loads((last / "config.json").read_text())
    assert (written["architectures"], written["hidden"], written["max_position_embeddings"]) == (["Small"], 8, 16)
    identity = load_trainer(last)["identity"]
    assert identity["model"] == {"hidden": 8, "vocabulary": written["vocabulary"]}
    with pytest.raises(ArgonneError, match="architectures=\\['Small'\\] in .* is not supported; legal: "):
        from_huggingface(last)


@pytest.mark.parametrize("other", [partial(build, hidden=16), None], ids=["another shape", "the Argonne model"])
def test_another_shape_is_refused_by_name_on_continuing(
    config: RunConfig, whole: Path, tmp_path: Path, other: Any
) -> None:
    begun = shutil.copytree(whole, tmp_path / "run")
    message = refusal(elsewhere(config, begun), other)
    assert message.startswith(f"output_dir={str(begun)!r} holds a different run (model."), message
    assert "hidden" in message
    assert history(begun) == history(whole)


@pytest.mark.parametrize("name", names_of(ModelFlags))
def test_a_flag_of_the_argonne_model_is_refused(config: RunConfig, name: str) -> None:
    named = replace(config, given=frozenset({name}))
    with pytest.raises(ArgonneError, match=f"^{name}=.* has no effect on a model of one's own; legal: leave it out$"):
        check(named, 1, build)


def test_longer_sequences_than_the_model_can_see_are_refused(config: RunConfig, tmp_path: Path) -> None:
    longer = replace(elsewhere(config, tmp_path), data=replace(config.data, block_size=25))
    assert refusal(longer, build) == "block_size=25 is more than model=Small can see; legal: 1 to 24"
    assert (
        pretrain(elsewhere(replace(config, data=replace(config.data, block_size=24)), tmp_path, stop_at_step=1), build)
        == 0
    )


def test_documents_that_the_model_does_not_keep_apart_are_refused(config: RunConfig, tmp_path: Path) -> None:
    apart = replace(elsewhere(config, tmp_path), data=replace(config.data, document_mask=True))
    assert refusal(apart, build).startswith("document_mask=True is not offered by model=Small; legal: leave it out")


class Blockless(Small):
    @property
    def blocks(self) -> list[nn.Module]:
        return []


def test_muon_for_a_model_without_blocks_is_refused_before_anything_is_written(
    config: RunConfig, tmp_path: Path
) -> None:
    muon = replace(elsewhere(config, tmp_path), training=replace(config.training, optimizer="muon"))
    found = refusal(muon, lambda execution, vocabulary: Blockless(execution, vocabulary))
    assert found.startswith("optimizer='muon' finds no matrices of blocks in model=Blockless; legal: adamw, or a model")
    assert list(tmp_path.iterdir()) == []


class Forgetful(Small):
    @property
    def shape(self) -> Any:
        raise NotImplementedError


class Strange(Small):
    shape = {"dtype": torch.float32}  # type: ignore[assignment] # noqa: RUF012


class Remembering(Small):
    def __init__(self, execution: Execution, vocabulary: int) -> None:
        super().__init__(execution, vocabulary)
        self.register_buffer("made_again", torch.zeros(2), persistent=False)
        self.blocks[0].register_buffer("mean", torch.zeros(2))


class Wide(Small):
    """Of a shape that the Argonne model would have something to say about."""

    @property
    def shape(self) -> Any:
        return {"hidden_size": [8, 4], "num_attention_heads": 0}


def test_a_shape_may_be_any_json(config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain(elsewhere(config, tmp_path, stop_at_step=1), Wide) == 0
    assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Forgetful, "model=Forgetful has no shape; legal: "),
        (Strange, "shape of model=Strange is not made of JSON "),
        (Remembering, "buffers of model=Remembering would be in no checkpoint: blocks.0.mean; legal: register_buffer("),
        (lambda execution, vocabulary: None, "model=NoneType is no torch.nn.Module; legal: "),
        (lambda execution, vocabulary: nn.Linear(2, 2), "model=Linear has no groups, shape, longest_sequence, "),
    ],
    ids=["no shape", "no JSON", "a buffer", "nothing", "no model"],
)
def test_what_does_not_meet_the_contract_is_refused_before_anything_is_written(
    config: RunConfig, tmp_path: Path, model: Any, message: str
) -> None:
    assert refusal(elsewhere(config, tmp_path), model).startswith(message)
    assert list(tmp_path.iterdir()) == []


def settled(groups: ProcessGroups, model: type[LanguageModel], config: RunConfig) -> str:
    def made(execution: Execution, vocabulary: int) -> LanguageModel:
        return model(execution, vocabulary)  # type: ignore[call-arg]

    try:
        return json.dumps(own_model(made, config, VOCABULARY, groups, DOUBLE).shape)
    except LayoutError as error:
        return str(error)


def test_a_pipeline_is_refused_unless_the_model_offers_stages(ranks: RankPool, config: RunConfig) -> None:
    layout = Layout(pipeline=2)
    flags = replace(config, parallel=replace(config.parallel, pipeline_parallel=2))
    for told in ranks.run(layout, settled, Small, flags):
        assert told.startswith("pipeline_parallel=2 is not offered by model=Small; legal: 1 (or a model whose ")
    for told in ranks.run(layout, settled, Unstaged, flags):
        assert told == "pipeline_parallel=2 needs stages, and model=Unstaged offers none; legal: 1"
    for told in ranks.run(layout, settled, Staged, flags):
        assert told == '{"stages": 2}'


def staged_run(groups: ProcessGroups, config: RunConfig) -> tuple[list[float], Parts]:
    """An evaluation and three steps of the model with stages, as the workflow builds and trains it."""

    def made(execution: Execution, vocabulary: int) -> LanguageModel:
        return Staged(execution, vocabulary)

    of_run = own_model(made, config, VOCABULARY, groups, DOUBLE)
    execution = Execution(groups, DOUBLE, plan=config.parallel.plan(groups.layout))
    model, replicas = build_replicas(of_run.build, execution, "replicate")
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(seed=3)
    tokens = torch.randint(VOCABULARY, (4, 2, 17), generator=torch.Generator().manual_seed(2))
    batch = Batch(tokens[..., :-1], tokens[..., 1:], divisor=4.0 * 2 * 16)
    losses = [sum_over(model.evaluate(batch.micro_batch(1), CrossEntropyLoss()), groups.replicas).item()]
    for _ in range(3):
        result = train_step(learner, batch, CrossEntropyLoss(), 1e-2, gradient_clip=0.5)
        assert result.norm is not None
        losses += [result.loss, result.norm]
    return losses, [(region, part.clone()) for region, part in regions_of(replicas.parameters)]


def test_a_model_with_stages_trains_in_a_pipeline(ranks: RankPool, config: RunConfig) -> None:
    losses, parts = staged_run(ProcessGroups.single(), config)
    expected = assemble([parts])
    for layout in (Layout(pipeline=2), Layout(pipeline=2, tensor=2)):
        flags = replace(config, parallel=replace(config.parallel, pipeline_parallel=2))
        results = ranks.run(layout, staged_run, flags)
        for found, _ in results:
            assert found == pytest.approx(losses, rel=1e-9)
        weights_now = assemble(parts for _, parts in results)
        assert weights_now.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(weights_now[name], value, 1e-8, name)


def norms_of(groups: ProcessGroups, kind: Any) -> list[list[float]]:
    """The norm's values as the workflow would begin with them: what a plain norm of torch made of itself."""
    model, replicas = build_replicas(partial(Small, vocabulary=VOCABULARY), Execution(groups, DOUBLE), kind)
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(seed=3)
    return [
        [*part.flatten().tolist()] for region, part in regions_of(replicas.parameters) if region.name == "norm.weight"
    ]


@pytest.mark.parametrize("kind", ["replicate", "zero1", "fsdp"])
def test_values_that_a_model_makes_of_its_own_are_kept(ranks: RankPool, kind: str) -> None:
    found = sorted(v for each in ranks.run(Layout(data=2), norms_of, kind) for part in each for v in part)
    values = torch.linspace(0.5, 1.5, 8).tolist()
    assert found == pytest.approx(sorted(values * 2) if kind == "replicate" else values)
