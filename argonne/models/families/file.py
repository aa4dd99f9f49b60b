"""A ``config.json`` that is read, and refusals that name the file, the field, its value and what is legal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from argonne.files import read_object
from argonne.parallel.errors import ArgonneError


@dataclass(frozen=True)
class ConfigFile:
    """The fields of a ``config.json``."""

    path: Path
    found: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ConfigFile:
        """Of a file, or of the directory that holds it.

        Raises:
            ArgonneError: there is no such file, or it holds no JSON object.
        """
        file = path / "config.json" if path.is_dir() else path
        try:
            return cls(file, read_object(file))
        except (OSError, ValueError) as error:
            raise ArgonneError(f"model config {str(file)!r} cannot be read: {error}") from error

    def refusal(self, field: str, value: Any, legal: str) -> ArgonneError:
        """Of a value that asks for what there is not."""
        return ArgonneError(f"{field}={value!r} in {str(self.path)!r} is not supported; legal: {legal}")

    def about(self, error: ArgonneError) -> ArgonneError:
        """``error``, with the name of the file."""
        return ArgonneError(f"model config {str(self.path)!r}: {error}")

    def require(self, field: str, legal: Sequence[Any], name: str = "", of: Mapping[str, Any] | None = None) -> None:
        """Refuse a field that is there with a value that is none of ``legal``.

        Numbers of another type are the same (1 and 1.0), but no truth values (0 is not False).

        Args:
            field: its name.
            legal: what it may be.
            name: as which it is shown; left out: ``field``.
            of: where it is; left out: in the file.
        """
        of = self.found if of is None else of
        if field in of and not any(_is_same(of[field], value) for value in legal):
            raise self.refusal(name or field, of[field], " or ".join(map(repr, legal)))


def _is_same(value: Any, legal: Any) -> bool:
    number = isinstance(legal, float) and isinstance(value, int) and not isinstance(value, bool)
    return bool(value == legal) and (type(value) is type(legal) or number)
