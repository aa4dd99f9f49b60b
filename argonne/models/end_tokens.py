"""Which tokens end a text, as the files beside a model's weights say."""

from __future__ import annotations

from pathlib import Path

from argonne.files import read_json
from argonne.parallel.errors import ArgonneError


def end_tokens(directory: Path) -> set[int]:
    """The ids that end a text, one or several, as ``generation_config.json`` and ``config.json`` name them.

    Raises:
        ArgonneError: a file cannot be read, or names something that is no id.
    """
    found: set[int] = set()
    for file in (directory / "generation_config.json", directory / "config.json"):
        if not file.exists():
            continue
        try:
            named = read_json(file).get("eos_token_id")
        except (OSError, ValueError, AttributeError) as error:
            raise ArgonneError(f"{str(file)!r} cannot be read: {error}") from error
        ids = named if isinstance(named, list) else [] if named is None else [named]
        if not all(type(token) is int for token in ids):
            raise ArgonneError(
                f"eos_token_id={named!r} in {str(file)!r} is not legal; legal: an id, a list of ids or null"
            )
        found.update(ids)
    return found
