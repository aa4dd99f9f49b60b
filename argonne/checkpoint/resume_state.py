"""How far a run elsewhere was: a small file beside the weights that it left, from which a run here can go on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from argonne.files import read_object, write_json
from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_whole

RESUME_STATE = "resume_state.json"
MOST_TOKENS = 2**62


@dataclass(frozen=True)
class RowsRead:
    """How far shards were read that are read one after the other, each from its first row to its last."""

    shard: int
    """Index of the shard in the natural numeric order of their names."""
    row: int
    """The row of that shard that was read last."""
    row_tokens: int | None = None
    """How many tokens of its document were trained on; None: that is not known, and it is to be read again."""
    epoch: int = 0
    """Passes over all shards before this one."""
    files: tuple[str, ...] = ()
    """Base names of the shards that were begun, by which an index into other shards is found out; empty: not known."""

    def __post_init__(self) -> None:
        for name, most in (("shard", MOST_TOKENS), ("row", MOST_TOKENS), ("epoch", 2**31 - 1)):
            require_whole(f"data_position.{name}", getattr(self, name), 0, most)
        if self.row_tokens is not None:
            require_whole("data_position.row_tokens", self.row_tokens, 0, MOST_TOKENS)
        if isinstance(self.files, str) or not all(isinstance(each, str) for each in self.files):
            raise ArgonneError(f"data_position.files={self.files!r} is not legal; legal: names of shards")

    def __str__(self) -> str:
        return f"row {self.row} of shard {self.shard}" + (f" in pass {self.epoch + 1}" if self.epoch else "")


@dataclass(frozen=True)
class ResumeState:
    """What ``resume_state.json`` says. Raises ``ArgonneError`` for what no run can go on from."""

    step: int
    """Optimizer steps that were taken."""
    tokens: int | None = None
    """Tokens that were trained on; None: not known."""
    data_position: RowsRead | None = None
    """None: not known, and the data begins anew."""

    def __post_init__(self) -> None:
        require_whole("step", self.step, 0)
        if self.tokens is not None:
            require_whole("tokens", self.tokens, 0, MOST_TOKENS)

    def __str__(self) -> str:
        tokens = "tokens not known" if self.tokens is None else f"{self.tokens:,} tokens"
        position = "place in the data not known" if self.data_position is None else f"at {self.data_position}"
        return f"step {self.step:,}, {tokens}, {position}"

    @property
    def identity(self) -> dict[str, Any]:
        """What makes a run that begins here another than one that begins elsewhere: JSON values."""
        found = asdict(self)
        if self.data_position is not None:
            del found["data_position"]["files"]
        return found

    def write(self, directory: Path) -> None:
        """Write it beside the weights in ``directory``."""
        write_json(directory / RESUME_STATE, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> ResumeState:
        """What lies beside the weights in ``directory``.

        Raises:
            ArgonneError: there is nothing, or it is of another form.
        """
        path = directory / RESUME_STATE
        if not path.exists():
            raise ArgonneError(
                f"{str(directory)!r} holds no {RESUME_STATE}; legal: what convert.py FILE DIR --resume-state makes of "
                "a file of the original, or no --resume-state"
            )
        try:
            said = _known(cls, read_object(path), "")
            if (position := said.get("data_position")) is not None:
                if not isinstance(position, dict):
                    raise ArgonneError(f"data_position={position!r} is not legal; legal: an object, or null")
                inner = _known(RowsRead, position, "data_position.")
                files = inner.get("files", [])
                if not isinstance(files, list):
                    raise ArgonneError(f"data_position.files={files!r} is not legal; legal: names of shards")
                said["data_position"] = RowsRead(**{**inner, "files": tuple(files)})
            return cls(**said)
        except (OSError, ValueError, ArgonneError) as error:
            raise ArgonneError(f"{str(path)!r} cannot be used: {error}") from None


def _known(kind: type[ResumeState] | type[RowsRead], said: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """``said``, if it has the fields of ``kind`` that have no default, and no others than its fields."""
    names = {"step"} if kind is ResumeState else {"shard", "row"}
    if missing := sorted(names - set(said)):
        raise ArgonneError(f"it lacks {prefix}{missing[0]}")
    legal = [each.name for each in fields(kind)]
    if others := sorted(set(said) - set(legal)):
        raise ArgonneError(f"{prefix}{others[0]} is not known; legal: {', '.join(legal)}")
    return dict(said)
