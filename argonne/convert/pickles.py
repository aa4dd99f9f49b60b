"""Files of ``torch.save``, read without running what is in them; mapped into memory where their format allows it."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from argonne.data.errors import one_line
from argonne.parallel.errors import ArgonneError

_READ = 1 << 22


def load_pickle(path: Path) -> Any:
    """What ``torch.save`` wrote to ``path``: tensors, containers and plain values, and nothing that runs code.

    A file of the zip form is compared with its checksums and then mapped, not read. One of the older form, which the
    original wrote first, has neither checksums nor a map: it is read whole.

    Raises:
        ArgonneError: it is not there, is no such file, is damaged, or asks for more than weights need.
    """
    if not path.is_file():
        raise ArgonneError(f"{str(path)!r} is not a file")
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _require_checksums(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the older form's types of storage
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # a damaged pickle may raise anything
        raise ArgonneError(f"{str(path)!r} cannot be read: {_reason(path, error)}") from error


def _require_checksums(path: Path) -> None:
    """Refuse a zip file one of whose records is not as it was written; one without checksums passes."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            for record in archive.infolist():
                if record.CRC == 0:  # torch.save was told to leave it out
                    continue
                # As zipfile reads a record, without its refusal of what has no checksum.
                file.seek(record.header_offset + 26)
                lengths = file.read(4)
                skipped = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
                file.seek(skipped, 1)
                found, left = 0, record.file_size
                while left and (block := file.read(min(left, _READ))):
                    found, left = zlib.crc32(block, found), left - len(block)
                if found != record.CRC:
                    raise ValueError(f"its record {record.filename!r} has changed since it was written")
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ArgonneError(f"{str(path)!r} is damaged: {one_line(error)}") from error


def _reason(path: Path, error: Exception) -> str:
    """Why a file cannot be loaded, in a few words: what the library says is long, and advises to run the code."""
    with path.open("rb") as file:
        begins = file.read(2)
    if isinstance(error, EOFError) or not begins or (begins == b"PK" and not zipfile.is_zipfile(path)):
        return "it ends too early"
    if begins[:1] != b"\x80" and begins != b"PK":
        return "it is nothing that torch.save wrote"
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL ([\w.]+)|class ([\w.]+)", text):
        return f"it asks for {found.group(1) or found.group(2)!r}, which weights do not need and which might run code"
    if isinstance(error, pickle.UnpicklingError):
        return "it holds more than tensors and plain values, or is damaged"
    return text[:200]
