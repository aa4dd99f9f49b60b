"""``--recompute`` and the switch that is its other name: one choice, kept under one name, and never two."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from argonne.launch.parse import parse
from argonne.models.recompute import Recompute
from argonne.parallel import ArgonneError
from argonne.training.config import RunConfig, TrainingFlags
from argonne.training.run.flags_json import flags_from_json, flags_to_json

MEANT = {
    "": Recompute.FULL,
    "--recompute full": Recompute.FULL,
    "--recompute 1": Recompute.FULL,
    "--recompute selective": Recompute.SELECTIVE,
    "--recompute none": Recompute.NONE,
    "--recompute 3": Recompute(every=3),
    "--disable-gradient-checkpointing": Recompute.NONE,
    "--disable-gradient-checkpointing --recompute none": Recompute.NONE,
}
REFUSED = {
    "--recompute some": "recompute='some' is not known",
    "--recompute 0": "recompute='0' is not known",
    "--recompute -1": "recompute='-1' is not known",
    "--recompute 1.5": "recompute='1.5' is not known",
    "--recompute 99999999999": "recompute=99999999999 is not legal",
    "--recompute full --disable-gradient-checkpointing": "recompute=full conflicts with disable_gradient_checkpointing",
    "--recompute 2 --disable-gradient-checkpointing": "recompute=2 conflicts with disable_gradient_checkpointing",
}


@pytest.mark.parametrize("words", MEANT)
def test_what_a_command_says_is_what_is_recomputed_and_what_a_run_keeps(words: str) -> None:
    config = parse(RunConfig, words.split())
    config.check()
    assert config.recompute == MEANT[words]
    kept = flags_from_json(json.loads(json.dumps(flags_to_json(config))))
    assert (kept.recompute, kept.training.disable_gradient_checkpointing) == (MEANT[words], False)


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_no_choice_or_two_is_refused_in_one_line(words: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        parse(RunConfig, words.split()).check()
    assert str(refusal.value).startswith(REFUSED[words])
    assert "; legal: " in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("words", MEANT)
@pytest.mark.parametrize(
    "saved", [TrainingFlags(recompute="selective"), TrainingFlags(disable_gradient_checkpointing=True)]
)
def test_what_a_command_names_counts_over_what_was_saved(words: str, saved: TrainingFlags) -> None:
    before = RunConfig(training=saved)
    assert parse(RunConfig, words.split(), before).recompute == (MEANT[words] if words else before.recompute)
    assert replace(before, given=frozenset({"seed"})).recompute == before.recompute
