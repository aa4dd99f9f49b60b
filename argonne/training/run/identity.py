"""What makes a run this run, whatever its layout: one value, kept as JSON with the run and each of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from argonne.data import changes
from argonne.parallel import Precision
from argonne.training.config import DataFlags, RunConfig, TrainingFlags
from argonne.training.run.reproducible import reproducible_identity
from argonne.training.schedule import Schedule

# Of the schedule. Those of the first line have always been flags.
_ALWAYS = ["total_steps", "learning_rate", "min_learning_rate", "warmup_steps", "weight_decay", "gradient_clip"]
_LATER = ["adam_beta1", "adam_beta2", "adam_epsilon", "label_smoothing", "z_loss", "schedule"]
_LATER += ["optimizer", "muon_momentum", "muon_precision"]

DATA = ("data.shards", "data.fingerprint", "data.weights", "data.text_column", "data.filters", "tokenizer.")
"""What --accept-data-change accepts: so begin the lines of ``differences`` about it."""

PRECISION_FLAGS = {"float32": "fp32", "float64": "fp64"}
"""The flag that keeps weights and moments in a dtype."""

# What identities of earlier versions lack, or what depends on a condition: no difference where one side has none.
_NOT_ALWAYS_KNOWN = (("precision",), ("initial_loss_scale",), ("tokenizer", "boundary"))


_BEFORE_FLAGS: Mapping[str, dict[str, Any]] = {
    "data": {"text_column": DataFlags().text_column},
    "schedule": {name: getattr(TrainingFlags(), name) for name in _LATER},
}
"""What every run was before there were flags for it, by the group of the identity."""


@dataclass(frozen=True)
class RunIdentity:
    """What a run is; None for what is not settled yet, or what an earlier version did not keep. All are JSON values."""

    data: Mapping[str, Any] | None = None
    """The shards, and how sequences are made of them: ``Corpora.identity``."""
    seed: int | None = None
    """Of the initial weights, the samples, and the order of shuffled data."""
    schedule: Mapping[str, Any] | None = None
    """The flags of the schedule, which ``resume.py`` may change on purpose."""
    precision: Mapping[str, Any] | None = None
    """``state``: the dtype of weights and moments."""
    initial_loss_scale: float | None = None
    """In float16 only."""
    model: Mapping[str, Any] | None = None
    """``LanguageModel.shape``: the fields of ``ArgonneConfig``, or what a model of one's own says."""
    tokenizer: Mapping[str, Any] | None = None
    """``fingerprint`` and ``size``, and ``boundary``: its (BOS, EOS) ids where documents are given them."""
    init_from: str | None = None
    """``weights_fingerprint`` of those that it began with, where they are not drawn by the seed."""
    resume_state: Mapping[str, Any] | None = None
    """``ResumeState.identity`` of where it began, where that is not step 0."""
    reproducible: Mapping[str, Any] | None = None
    """``blocks`` and ``micro_batch``, of a run whose bits no layout changes."""
    loss: Mapping[str, Any] | None = None
    """``LossOfRun.identity``, of a run that minimises something else than pretraining."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """What a later version keeps besides."""

    @classmethod
    def of(cls, config: RunConfig, data: Mapping[str, Any], precision: Precision) -> RunIdentity:
        """What the flags and the data settle, before model and tokenizer are."""
        training = config.training
        return cls(
            data=data,
            seed=training.seed,
            schedule={name: getattr(training, name) for name in (*_ALWAYS, *_LATER)} | _decay(training.learning_rates),
            precision={"state": dtype_name(precision.parameters)},
            initial_loss_scale=training.initial_loss_scale if precision.compute is torch.float16 else None,
            reproducible=reproducible_identity(config),
        )

    @classmethod
    def from_json(cls, saved: Any) -> RunIdentity:
        """The identity that ``to_json`` gave. Raises ``ValueError`` naming what is of another kind."""
        names = [each.name for each in dataclasses.fields(cls) if each.name != "others"]
        wrong: dict[str, bool] = {"identity": not isinstance(saved, dict)}
        if isinstance(saved, dict):
            groups = ("data", "schedule", "precision", "model", "tokenizer", "reproducible", "resume_state", "loss")
            wrong |= {f"identity.{name}": not isinstance(saved.get(name, {}), dict) for name in groups}
            data = saved.get("data")
            if isinstance(data, dict):
                shards = data.get("shards") or []
                listed = isinstance(shards, list) and all(isinstance(each, list) for each in shards)
                wrong["identity.data.shards"] = not listed
                wrong["identity.data.lanes"] = not is_count(data.get("lanes") or 1)
            wrong["identity.init_from"] = not isinstance(saved.get("init_from", ""), str)
        for name, is_wrong in wrong.items():
            if is_wrong:
                raise ValueError(f"its {name} is of another kind")
        known = {name: saved[name] for name in names if name in saved}
        return cls(**known, others={name: value for name, value in saved.items() if name not in names})

    @classmethod
    def of_saved(cls, saved: Mapping[str, Any]) -> RunIdentity:
        """The identity in ``run.json`` or ``trainer.json``.

        Of older ones the flags give the precision, and what had no flag yet was as a flag left out.

        Raises:
            ValueError: what in there is of another kind.
        """
        identity = cls.from_json(saved["identity"])
        for group, before in _BEFORE_FLAGS.items():
            if (kept := getattr(identity, group)) is not None:
                identity = dataclasses.replace(identity, **{group: before | kept})
        flags = saved.get("flags")
        training = flags.get("training") if isinstance(flags, Mapping) else None
        name = training.get("precision") if isinstance(training, Mapping) else None
        if identity.precision is not None or name is None:
            return identity
        return dataclasses.replace(identity, precision={"state": "float64" if name == "fp64" else "float32"})

    def to_json(self) -> dict[str, Any]:
        """What is kept: without what is not known."""
        entries = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "others"}
        return {name: value for name, value in entries.items() if value is not None} | dict(self.others)

    def differences(self, now: RunIdentity, parts: Collection[str] | None = None) -> list[str]:
        """What is not the same in ``now``, a line for each entry; in ``parts`` only, all where they are left out.

        What one of them cannot know is no difference.
        """
        before, after = self.to_json(), now.to_json()
        if parts is not None:
            before, after = ({name: entries.get(name) for name in parts} for entries in (before, after))
        return differences(*_comparable(before, after))

    @property
    def shards(self) -> list[Any]:
        """The listing of the shards of each corpus."""
        return (self.data or {}).get("shards") or []

    @property
    def lanes(self) -> int | None:
        """Of each corpus."""
        return (self.data or {}).get("lanes")

    @property
    def sequences(self) -> int | None:
        """Of one pass over the data, of a run that counts its steps by passes."""
        return (self.data or {}).get("sequences")

    @property
    def is_streamed(self) -> bool | None:
        """Whether the data is tokenised while training."""
        return (self.data or {}).get("streaming")

    @property
    def tokens(self) -> tuple[Any, ...]:
        """What decides which documents there are and which tokens they have."""
        return self.fingerprint, *((self.data or {}).get(name) for name in ("text_column", "filters"))

    @property
    def fingerprint(self) -> str | None:
        """Of the tokenizer."""
        return (self.tokenizer or {}).get("fingerprint")

    @property
    def optimizer(self) -> str | None:
        """What its moments are of."""
        return (self.schedule or {}).get("optimizer")

    @property
    def state_dtype(self) -> str:
        """Of weights and moments."""
        return str((self.precision or {}).get("state"))


def differences(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """``name: saved -> wanted`` for every entry that differs; nested entries as ``group.name``.

    Of ``shards``, which say more than their ``fingerprint``, what was added, removed or changed.
    """
    found = []
    for name in sorted(set(saved) | set(wanted)):
        old, new = saved.get(name), wanted.get(name)
        if name == "shards" and isinstance(old, list) and isinstance(new, list):
            found += [f"shards: {line}" for line in _changed_shards(old, new)]
        elif name == "fingerprint" and saved.get("shards") != wanted.get("shards"):
            continue
        elif isinstance(old, Mapping) and isinstance(new, Mapping):
            found += [f"{name}.{line}" for line in differences(old, new)]
        elif old != new:
            found.append(f"{name}: {_short(old)} -> {_short(new)}")
    return found


def _decay(schedule: Schedule) -> dict[str, Any]:
    """What only a schedule with a decay of its own has, in numbers even where the flags leave them open."""
    names = ("decay_steps", "decay_shape") if schedule.kind == "wsd" else ()
    return {name: getattr(schedule, name) for name in names}


def dtype_name(dtype: torch.dtype) -> str:
    """``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _comparable(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Both without what one of them cannot know."""
    both = dict(saved), dict(wanted)
    for *groups, name in _NOT_ALWAYS_KNOWN:
        inner: list[dict[str, Any]] = list(both)
        for group in groups:
            for each in inner:
                each[group] = dict(each.get(group) or {})
            inner = [each[group] for each in inner]
        if any(each.get(name) is None for each in inner):
            for each in inner:
                each.pop(name, None)
    return both


def _changed_shards(saved: list[Any], wanted: list[Any]) -> list[str]:
    """A line for each change in the listings of the corpora."""
    if len(saved) != len(wanted):
        return [f"{len(saved)} corpora -> {len(wanted)} corpora"]
    lines = [changes(old, new) for old, new in zip(saved, wanted, strict=True)]
    return [line if len(lines) == 1 else f"corpus {number}: {line}" for number, of in enumerate(lines) for line in of]


def is_count(value: Any) -> bool:
    """Whether a JSON value is a number of things."""
    return type(value) is int and value >= 1


def _short(value: Any) -> str:
    text = json.dumps(value) if not isinstance(value, str) else value
    return text if len(text) <= 60 else text[:24] + "..." + text[-12:]
