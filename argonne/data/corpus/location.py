"""Where shards lie: local paths, and URLs of the file systems that pyarrow reaches."""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
from pyarrow import fs

from argonne.data.errors import DataError, one_line

SUFFIXES = ("parquet", "arrow")
LINES = ("jsonl", "jsonl.gz", "jsonl.zst")
"""Of files of JSON lines."""

_KINDS = (SUFFIXES, LINES)

# Those of pyarrow's FileSystem.from_uri; the value says what stands after the two slashes.
_SCHEMES = {
    "s3": "bucket",
    "gs": "bucket",
    "gcs": "bucket",
    "abfs": "container@account",
    "abfss": "container@account",
    "hdfs": "host:port",
    "viewfs": "cluster",
    "hf": "datasets",
}
_LEGAL = f"legal: a path, file://, {', '.join(f'{scheme}://' for scheme in _SCHEMES)}, or fsspec+NAME://"


@dataclass(frozen=True)
class Url:
    """A file that is not on a local path; it has the `name` of one, and reads as its address."""

    address: str
    folder: str
    """The address of a folder, from which pyarrow learns the file system."""
    key: str
    """The file's path in that file system."""

    @property
    def name(self) -> str:
        """The base name."""
        return self.key.rsplit("/", 1)[-1]

    def __str__(self) -> str:
        return self.address


Location = Path | Url


def is_url(pattern: str) -> bool:
    """Whether it begins with a scheme: such a pattern is absolute already."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", pattern) is not None


def expand(pattern: str) -> list[Location]:
    """The files that a path, a glob, a directory or a URL of any of these stands for.

    A directory stands for the Parquet and Arrow files in it; where there are none, for those of JSON lines.

    Raises:
        DataError: a URL is not legal, or its file system does not answer.
    """
    if not is_url(pattern):
        return list(_expand_path(pattern))
    scheme, rest = pattern.split("://", 1)
    scheme = scheme.lower()
    if scheme == "file":
        if not rest.startswith("/"):
            raise DataError(f"data URL {pattern} names a host; legal: file:///path, with three slashes")
        return list(_expand_path(unquote(rest)))
    return list(_expand_url(pattern, scheme, rest))


def open_source(location: Location, mapped: bool = False) -> pa.NativeFile:
    """The file's bytes, for random access; `mapped` into memory if it is local."""
    if isinstance(location, Url):
        system, _ = _connect(location.folder)
        return system.open_input_file(location.key)
    return pa.memory_map(str(location)) if mapped else pa.OSFile(str(location))


def _expand_path(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = ([file for suffix in kind for file in path.glob(f"*.{suffix}") if file.is_file()] for kind in _KINDS)
        return next(filter(None, found), [])
    if path.is_file():  # taken as it stands: a file name may hold the characters of a glob
        return [path]
    return [Path(file) for file in glob.glob(str(path), recursive=True) if os.path.isfile(file)]


def _expand_url(pattern: str, scheme: str, rest: str) -> list[Url]:
    if scheme not in _SCHEMES and not scheme.startswith("fsspec+"):
        raise DataError(f"data URL {pattern} has the unknown scheme {scheme!r}; {_LEGAL}")
    # A question mark is a wildcard unless options (name=value) follow it.
    options = re.search(r"\?[^/?]*=.*$", rest)
    rest, query = (rest[: options.start()], options.group()) if options else (rest, "")
    host, _, path = rest.partition("/")
    if scheme in _SCHEMES and not host:
        raise DataError(f"data URL {pattern} names no {_SCHEMES[scheme]}; legal: {scheme}://{_SCHEMES[scheme]}/...")
    if scheme in ("gs", "gcs") and "retry_limit_seconds" not in query:  # the default is to try for a quarter of an hour
        query += ("&" if query else "?") + "retry_limit_seconds=30"
    wildcard = re.search(r"[*?[]", path)
    fixed = path[: wildcard.start()] if wildcard else path
    folder, wanted = path[: fixed.rfind("/") + 1], path[fixed.rfind("/") + 1 :]
    prefix = f"{scheme}://{host}/{folder}"
    plain = scheme.startswith("fsspec+")  # pyarrow hands these on as they are
    address = f"{scheme}://{host}/{folder if plain else quote(folder, safe='/%')}{query}"
    try:
        system, base = _connect(address)
        found = _list(system, base, wanted)
    except Exception as error:  # each file system, and fsspec's above all, raises its own
        raise DataError(f"data URL {pattern} cannot be listed: {one_line(error)}") from error
    return [Url(prefix + relative, address, key) for relative, key in found]


@functools.cache
def _connect(address: str) -> tuple[Any, str]:
    """The file system, and the folder's path in it."""
    system, path = fs.FileSystem.from_uri(address)
    return system, path


def _list(system: Any, base: str, wanted: str) -> list[tuple[str, str]]:
    """The (relative path, key) of each file below `base` that matches `wanted`, a glob, name or directory."""
    above = len([part for part in base.split("/") if part])
    kinds, recursive = [[wanted.split("/")]], "/" in wanted
    if not re.search(r"[*?[]", wanted):
        info = system.get_file_info(f"{base.rstrip('/')}/{wanted}" if wanted else base)
        if info.type == fs.FileType.File:
            return [(wanted, info.path)]
        if info.type != fs.FileType.Directory:
            return []
        base, recursive = info.path, False
        kinds = [[[*filter(None, [wanted]), f"*.{suffix}"] for suffix in kind] for kind in _KINDS]
    listed = system.get_file_info(fs.FileSelector(base, recursive=recursive, allow_not_found=True))
    files = [info.path for info in listed if info.type == fs.FileType.File]
    for patterns in kinds:
        found = []
        for file in files:
            parts = [part for part in file.split("/") if part][above:]
            if any(_matches(parts, pattern) for pattern in patterns):
                found.append(("/".join(parts), file))
        if found:
            return found
    return []


def _matches(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """As `glob` does: a wildcard stands for no slash and no leading dot, `**` for any number of folders."""
    if not patterns:
        return not parts
    first, rest = patterns[0], patterns[1:]
    if first == "**":
        hidden = [index for index, part in enumerate(parts) if part.startswith(".")] or [len(parts)]
        return any(_matches(parts[skip:], rest) for skip in range(hidden[0] + 1))
    if not parts or (parts[0].startswith(".") and not first.startswith(".")):
        return False
    return fnmatch.fnmatchcase(parts[0], first) and _matches(parts[1:], rest)
