"""Rotary positions in a ``config.json``: as ``transformers`` 4 spells them, and as 5 does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from argonne.models.config import ArgonneConfig
from argonne.models.families.file import ConfigFile
from argonne.models.rope import NEEDED, OPTIONAL, RopeScaling
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_number

_THETA = 10_000.0
"""What every family here assumes when a file is silent."""
_PLACES = ("rope_parameters", "rope_scaling")
_KNOWN = {"rope_type", "type", "rope_theta", "partial_rotary_factor", *(field.name for field in fields(RopeScaling))}


def read_rope(file: ConfigFile, longest: Any) -> tuple[Any, RopeScaling | None]:
    """The base of the frequencies, whichever of its three places names it, and how they are stretched.

    ``longest`` is the model's longest sequence: what was stretched, where the file does not say.

    Of what a type does not read nothing is heeded, as in ``transformers``; what no type reads is refused.

    Raises:
        ArgonneError: it is another rotation, or two places do not say the same.
    """
    parts = {place: _part(file, place) for place in _PLACES}
    theta = {f"{place}.rope_theta": part["rope_theta"] for place, part in parts.items() if "rope_theta" in part}
    if "rope_theta" in file.found:
        theta["rope_theta"] = file.found["rope_theta"]
    try:
        for name, value in theta.items():
            require_number(name, value)
    except ArgonneError as error:
        raise file.about(error) from None
    told = {place: _scaling(file, place, part, longest) for place, part in parts.items() if _says_type(part)}
    if len(set(theta.values())) > 1:
        raise _disagree(file, theta)
    if len(set(told.values())) > 1:
        raise _disagree(file, {place: None if s is None else s.as_json() for place, s in told.items()})
    return next(iter(theta.values()), _THETA), next(iter(told.values()), None)


def written_rope(config: ArgonneConfig) -> dict[str, Any]:
    """``transformers`` 5 reads ``rope_parameters``, everything older the others."""
    scaling = None if config.rope_scaling is None else config.rope_scaling.as_json()
    kind = {"rope_type": "default"} if scaling is None else scaling
    return {
        "rope_theta": config.rope_theta,
        "rope_parameters": {**kind, "rope_theta": config.rope_theta},
        **({} if scaling is None else {"rope_scaling": scaling}),
    }


def _part(file: ConfigFile, place: str) -> Mapping[str, Any]:
    part = {} if file.found.get(place) is None else file.found[place]
    if not isinstance(part, dict):
        raise ArgonneError(f"{place}={part!r} in {str(file.path)!r} is not legal; legal: a JSON object, or null")
    for name, value in part.items():
        if isinstance(value, dict) or (name not in _KNOWN and value is not None):
            raise file.refusal(f"{place}[{name!r}]", value, f"the fields of rope_type {_legal_types()}")
    for name in ("rope_type", "type"):
        if name in part and part[name] not in ("default", *NEEDED):
            raise file.refusal(f"{place}.{name}", part[name], _legal_types())
    if _says_type(part) and part.get("rope_type", part.get("type")) != part.get("type", part.get("rope_type")):
        raise _disagree(file, {f"{place}.{name}": part[name] for name in ("rope_type", "type")})
    file.require("partial_rotary_factor", (1.0, None), f"{place}.partial_rotary_factor", part)
    return part


def _scaling(file: ConfigFile, place: str, part: Mapping[str, Any], longest: Any) -> RopeScaling | None:
    kind = part.get("rope_type", part.get("type"))
    if kind == "default":
        return None
    read: dict[str, Any] = {name: part.get(name) for name in (*NEEDED[kind], *OPTIONAL[kind])}
    if "original_max_position_embeddings" in read:
        if read["original_max_position_embeddings"] is None:
            read["original_max_position_embeddings"] = longest
        outside, inside = file.found.get("original_max_position_embeddings"), read["original_max_position_embeddings"]
        if outside not in (None, inside):  # transformers 4 heeds the one, 5 the other
            names = ("original_max_position_embeddings", f"{place}.original_max_position_embeddings")
            raise _disagree(file, dict(zip(names, (outside, inside), strict=True)))
    try:
        return RopeScaling(kind, **read)
    except ArgonneError as error:
        raise file.about(ArgonneError(str(error).replace("rope_scaling.", f"{place}."))) from None


def _says_type(part: Mapping[str, Any]) -> bool:
    return "rope_type" in part or "type" in part


def _legal_types() -> str:
    return ", ".join(("default", *NEEDED))


def _disagree(file: ConfigFile, told: Mapping[str, Any]) -> ArgonneError:
    listed = ", ".join(f"{name}={value}" for name, value in told.items())
    return ArgonneError(f"model config {str(file.path)!r} has {listed}; legal: the same in every place")
