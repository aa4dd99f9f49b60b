"""What a run is at one moment: saved whole, restored whole, and refused where a checkpoint does not tell all of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.checkpoint import CheckpointError, load_trainer, read_manifest
from argonne.checkpoint.format import commit, record_file
from argonne.data import DataPosition, LaneState
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.errors import ArgonneError
from argonne.training.state import TrainingState, versions
from tests.pool import RankPool
from tests.training.settled import SEED, SmallRun, assert_same, held
from tests.whole import Parts, assemble

ALONE = ProcessGroups.single()
LANES = {
    lane: LaneState(DataPosition(1, lane, 2 * lane, 3, 4), documents=50 + lane, tokens=999, dropped={"too short": lane})
    for lane in range(3)
}
GLOBAL_BATCH = 6


def empty(small: SmallRun, directory: Path, groups: ProcessGroups = ALONE, **training: Any) -> TrainingState:
    """The state of a run before it has weights."""
    return TrainingState.build(small.configured(directory, training), small.workload, groups)


def somewhere(small: SmallRun, directory: Path, groups: ProcessGroups = ALONE, **training: Any) -> TrainingState:
    """The state of a run on its way, with values drawn from a seed in every weight and moment."""
    state = empty(small, directory, groups, **training)
    state.initialise(SEED)
    draw = torch.Generator().manual_seed(9)
    for sharded in state.parameters:
        own = state.optimizer.state[sharded.parameter]
        for tensor in (sharded.parameter.data, own["exp_avg"], own["exp_avg_sq"]):
            for region in sharded.spec.regions:  # and not the padding of a vocabulary, which is never saved
                tensor[region.local_index] += torch.rand(region.shape, generator=draw)
        own["step"].fill_(31)
    state.replicas.publish()
    state.step, state.tokens, state.next_sample, state.lanes = 33, 3168, 198, dict(LANES)
    state.changes = [{"step": 12, "text": "the learning rate was halved"}]
    state.schedule = replace(state.schedule, rewarmup_after=20, rewarmup_steps=7)
    return state


def save(state: TrainingState, small: SmallRun, directory: Path, **training: Any) -> Path:
    config = small.configured(directory, training)
    return state.save(config, small.workload, state.all_lanes(), GLOBAL_BATCH)


@pytest.fixture(scope="module")
def checkpoint(small: SmallRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("saved")
    return save(somewhere(small, directory), small, directory)


def test_what_is_saved_is_what_is_restored(small: SmallRun, checkpoint: Path, tmp_path: Path) -> None:
    before, after = somewhere(small, tmp_path), empty(small, tmp_path)
    after.restore(checkpoint)
    assert_same(held(after), held(before))
    for name in ("step", "tokens", "next_sample", "lanes", "schedule", "loss_scale"):
        assert getattr(after, name) == getattr(before, name), name
    assert {after.optimizer.state[each.parameter]["step"].item() for each in after.parameters} == {31.0}


def test_what_was_restored_is_saved_again_byte_for_byte(small: SmallRun, checkpoint: Path, tmp_path: Path) -> None:
    state = empty(small, tmp_path)
    state.restore(checkpoint)
    state.changes = load_trainer(checkpoint)["changes"]
    again = save(state, small, tmp_path)
    assert again.name == checkpoint.name
    for path in sorted(path for path in checkpoint.rglob("*") if path.suffix == ".safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    one, other = load_trainer(checkpoint), load_trainer(again)
    for told in (one, other):
        del told["flags"]["run"]["output_dir"]
    assert one == other


def test_a_checkpoint_tells_what_the_run_is_besides_its_tensors(small: SmallRun, checkpoint: Path) -> None:
    told = load_trainer(checkpoint)
    assert {name: told[name] for name in ("step", "tokens", "optimizer_step", "global_batch", "rng")} == {
        "step": 33,
        "tokens": 3168,
        "optimizer_step": 31,
        "global_batch": GLOBAL_BATCH,
        "rng": {"seed": SEED},
    }
    assert told["schedule"]["rewarmup_after"] == 20
    assert told["data"]["shards"] == ["part-0.parquet", "part-1.parquet"]
    assert {int(lane): LaneState.from_dict(state) for lane, state in told["data"]["lanes"].items()} == LANES
    assert told["changes"] == [{"step": 12, "text": "the learning rate was halved"}]
    assert told["versions"] == versions()
    assert {"argonne", "python", "torch", "transformers", "safetensors"} == set(told["versions"])
    assert "loss_scale" not in told, "only float16 has one"
    shape = json.loads((checkpoint / "config.json").read_text())
    assert (shape["hidden_size"], shape["max_position_embeddings"]) == (24, small.config.data.block_size)
    special = json.loads((checkpoint / "generation_config.json").read_text())
    assert special["eos_token_id"] == small.workload.tokenizer.eos_token_id  # type: ignore[union-attr]


def test_the_moments_begin_anew_and_the_rate_warms_up_where_that_is_asked_for(
    small: SmallRun, checkpoint: Path, tmp_path: Path
) -> None:
    state = empty(small, tmp_path)
    state.restore(checkpoint, reset_optimizer=True, rewarmup_steps=4)
    found, expected = held(state), held(somewhere(small, tmp_path))
    for name, value in found.items():
        assert torch.equal(value, torch.zeros_like(value) if ".exp_avg" in name else expected[name]), name
    assert {state.optimizer.state[each.parameter]["step"].item() for each in state.parameters} == {0.0}
    assert (state.schedule.rewarmup_after, state.schedule.rewarmup_steps) == (33, 4)
    assert (state.step, state.tokens, state.lanes) == (33, 3168, LANES)


def test_the_schedule_is_that_of_the_flags_but_for_its_second_warm_up(
    small: SmallRun, checkpoint: Path, tmp_path: Path
) -> None:
    state = empty(small, tmp_path, total_steps=900, learning_rate=0.5)
    state.restore(checkpoint)
    assert (state.schedule.total_steps, state.schedule.peak) == (900, 0.5)
    assert (state.schedule.rewarmup_after, state.schedule.rewarmup_steps) == (20, 7)


def test_the_loss_scale_of_float16_goes_on_where_it_was(small: SmallRun, checkpoint: Path, tmp_path: Path) -> None:
    half: dict[str, Any] = {"precision": "fp16", "initial_loss_scale": 2.0**20}
    before = somewhere(small, tmp_path, **half)
    before.loss_scale.scale, before.loss_scale.steps_since_change = 2.0**13, 77
    scaled = save(before, small, tmp_path, **half)
    after = empty(small, tmp_path, **half)
    after.restore(scaled)
    assert after.loss_scale == before.loss_scale
    assert after.loss_scale.is_dynamic
    # A run that was not scaled begins with the flag's; one that is scaled no more forgets it.
    after = empty(small, tmp_path, **half)
    after.restore(checkpoint)
    assert (after.loss_scale.scale, after.loss_scale.steps_since_change) == (2.0**20, 0)
    plain = empty(small, tmp_path)
    plain.restore(scaled)
    assert (plain.loss_scale.scale, plain.loss_scale.is_dynamic) == (1.0, False)


def without(*names: str) -> Callable[[dict[str, Any]], None]:
    def damage(told: dict[str, Any]) -> None:
        for name in names[:-1]:
            told = told[name]
        del told[names[-1]]

    return damage


INCOMPLETE: dict[str, Callable[[dict[str, Any]], None]] = {
    "step": without("step"),
    "tokens": without("tokens"),
    "data": without("data"),
    "next_sample": without("data", "next_sample"),
    "lanes": without("data", "lanes"),
    "schedule": without("schedule"),
    "rewarmup_after": without("schedule", "rewarmup_after"),
    "rewarmup_steps": without("schedule", "rewarmup_steps"),
    "optimizer_step": without("optimizer_step"),
    "position": without("data", "lanes", "1", "position"),
    "row_group": without("data", "lanes", "2", "position", "row_group"),
}


@pytest.mark.parametrize("what", INCOMPLETE)
def test_a_checkpoint_that_does_not_tell_all_is_refused_in_one_line_that_names_what(
    small: SmallRun, checkpoint: Path, tmp_path: Path, what: str
) -> None:
    told = load_trainer(checkpoint)
    INCOMPLETE[what](told)
    partial, being_written = tmp_path / checkpoint.name, tmp_path / f"{checkpoint.name}.tmp"
    being_written.mkdir()
    for path in checkpoint.iterdir():
        if path.name not in ("trainer.json", "manifest.json"):
            (being_written / path.name).symlink_to(path)
    (being_written / "trainer.json").write_text(json.dumps(told))
    manifest = read_manifest(checkpoint)  # a sound one: it was the writer that left something out
    records = {**manifest.files, "trainer.json": record_file(being_written / "trainer.json")}
    commit(being_written, partial, replace(manifest, files=records))
    state = empty(small, tmp_path)
    before = held(state)
    with pytest.raises(ArgonneError) as refusal:
        state.restore(partial)
    line = str(refusal.value)
    assert what in line
    assert "\n" not in line
    if "position" not in line:
        assert line.startswith(f"{str(partial / 'trainer.json')!r} is not complete: ")
    assert_same(held(state), before)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"step": 3'])
def test_a_trainer_json_that_is_none_is_refused_by_its_name(
    small: SmallRun, checkpoint: Path, tmp_path: Path, content: str
) -> None:
    (tmp_path / "trainer.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer\.json' (cannot be read|is not complete)"):
        empty(small, tmp_path).restore(tmp_path)


def test_initial_weights_are_those_of_the_seed(small: SmallRun, tmp_path: Path) -> None:
    first, same, other = (empty(small, tmp_path) for _ in range(3))
    for state, seed in ((first, 3), (same, 3), (other, 4)):
        state.initialise(seed)
    assert_same(held(same), held(first))
    with pytest.raises(AssertionError):
        assert_same(held(other), held(first))


def lanes_of_ranks(groups: ProcessGroups, small: SmallRun, directory: Path) -> dict[int, LaneState]:
    state = empty(small, directory, groups)
    # Only the ranks that read know their lanes: rank 0 of a model.
    if groups.model.rank == 0:
        state.lanes = {
            lane: each for lane, each in reversed(LANES.items()) if lane % groups.data.size == groups.data.rank
        }
    found = state.all_lanes()
    assert list(found) == sorted(found)
    return found


def test_every_rank_is_told_the_lanes_of_all(ranks: RankPool, small: SmallRun, tmp_path: Path) -> None:
    layout = Layout(data=2, tensor=2)
    assert ranks.run(layout, lanes_of_ranks, small, tmp_path) == [LANES] * 4


def restored(groups: ProcessGroups, small: SmallRun, checkpoint: Path, directory: Path) -> tuple[Parts, list[Any]]:
    state = empty(small, directory, groups)
    state.restore(checkpoint)
    parts = []
    for sharded in state.parameters:
        own = state.optimizer.state[sharded.parameter]
        for what, tensor in (("", sharded.parameter.detach()), (".m", own["exp_avg"]), (".v", own["exp_avg_sq"])):
            parts += [(replace(r, name=r.name + what), tensor[r.local_index].clone()) for r in sharded.spec.regions]
    steps = [state.optimizer.state[each.parameter]["step"].item() for each in state.parameters]
    return parts, [state.step, state.tokens, state.next_sample, state.lanes, state.schedule, set(steps)]


def test_the_ranks_of_another_layout_restore_the_same_between_them(
    ranks: RankPool, small: SmallRun, checkpoint: Path, tmp_path: Path
) -> None:
    alone, told = restored(ALONE, small, checkpoint, tmp_path)
    results = ranks.run(Layout(data=2, tensor=2), restored, small, checkpoint, tmp_path)
    whole, expected = assemble(parts for parts, _ in results), assemble([alone])
    assert_same(whole, expected)
    assert [facts for _, facts in results] == [told] * 4


def test_a_run_that_goes_on_from_a_checkpoint_is_the_run_that_never_stopped(
    small: SmallRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("argonne.training.report.plot_loss", lambda *what: False)
    whole = small.trainer(small.configured(tmp_path / "whole", {}), ALONE)
    whole.run()
    halves = small.configured(tmp_path / "halves", {})
    small.trainer(small.configured(tmp_path / "halves", {}, stop_at_step=2), ALONE).run()
    second = small.trainer(halves, ALONE, tmp_path / "halves" / "step_00000002")
    second.run()
    assert_same(held(second.state), held(whole.state))
    for name in ("step", "tokens", "next_sample", "lanes", "schedule"):
        assert getattr(second.state, name) == getattr(whole.state, name), name
