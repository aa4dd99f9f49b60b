"""A model that lacks part of the contract is told which, in one line."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from argonne.models import ArgonneConfig, ArgonneModel, BaseModel, Execution, LanguageModel, require_contract
from argonne.parallel import ArgonneError, ProcessGroups
from tests.models.own import Small

EXECUTION = Execution(ProcessGroups.single())
MEMBERS = {name: found for name, found in vars(LanguageModel).items() if not name.startswith("_")}


def test_the_models_here_have_every_member() -> None:
    assert len(MEMBERS) >= 16
    require_contract(Small(EXECUTION))
    require_contract(ArgonneModel(ArgonneConfig(16, 2, 4, 2, 24, 32), EXECUTION))


def having(members: dict[str, Any]) -> nn.Module:
    return type("Stranger", (nn.Module,), members)()


def stranger() -> dict[str, Any]:
    """Every member, and nothing else."""
    return {name: found if not isinstance(found, property) else 3 for name, found in MEMBERS.items()}


def refusal(model: object) -> str:
    with pytest.raises(ArgonneError) as error:
        require_contract(model)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_model_needs_no_base_of_ours() -> None:
    require_contract(having(stranger()))


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_that_is_missing_is_named(name: str) -> None:
    members = stranger()
    del members[name]
    assert refusal(having(members)).startswith(f"model=Stranger has no {name}; legal: a model with every member of ")


@pytest.mark.parametrize("name", ["forward", "head", "shape", "longest_sequence"])
def test_what_a_subclass_of_the_base_has_forgotten_is_named(name: str) -> None:
    model = Small(EXECUTION)
    if name == "head":
        del model._modules["head"]
    model.__class__ = type("Forgetful", (BaseModel,), {n: v for n, v in vars(Small).items() if n != name})
    assert refusal(model).startswith(f"model=Forgetful has no {name}; legal: ")


def test_several_that_are_missing_are_all_named() -> None:
    members = stranger()
    for name in ("shape", "evaluate"):
        del members[name]
    assert refusal(having(members)).startswith("model=Stranger has no shape, evaluate; legal: ")


def test_a_property_that_is_a_method_is_named_and_the_other_way_round() -> None:
    wrong = stranger() | {"longest_sequence": lambda self: 24}
    assert refusal(having(wrong)) == "longest_sequence of model=Stranger is a method; legal: a property"
    wrong = stranger() | {"evaluate": 3}
    assert refusal(having(wrong)) == "evaluate of model=Stranger is no method; legal: a method"


def test_what_is_no_module_is_refused() -> None:
    assert refusal(None) == "model=NoneType is no torch.nn.Module; legal: one that is"


def test_the_head_and_the_blocks_of_a_base_model_are_the_modules_that_are_assigned() -> None:
    model = Small(EXECUTION)
    assert model.head is model._modules["head"]
    assert model.blocks == list(model._modules["blocks"].children())  # type: ignore[union-attr]
    assert (model.stages, model.masks_documents, model.defers_weight_gradients) == ({}, False, False)
