"""What the README and docs/ name is there: links, tests, files, rooms, functions and terms."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {path.relative_to(ROOT).as_posix(): path for path in FILES}
OF_NOW = [name for name in PAGES if name != "docs/log.md"]
"""The log tells of files as they were."""


def text(page: str) -> str:
    return PAGES[page].read_text(encoding="utf-8")


def headings(path: Path) -> set[str]:
    """The anchors of a page's headings, as the sites that show Markdown make them."""
    found = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@cache
def defined(path: Path) -> frozenset[str]:
    """What a file defines: functions, classes, and as ``Class.name`` methods, fields and attributes."""
    names: set[str] = set()

    def collect(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(prefix + child.name)
                collect(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)
            elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                names.add(prefix + child.target.id)
            elif isinstance(child, ast.Assign):
                names.update(prefix + target.id for target in child.targets if isinstance(target, ast.Name))
            else:
                collect(child, prefix)

    collect(ast.parse(path.read_text(encoding="utf-8")), "")
    return frozenset(names)


@cache
def all_names() -> frozenset[str]:
    """Every name that ``argonne`` defines or passes on, with and without the class that has it."""
    found: set[str] = set()
    for path in (ROOT / "argonne").rglob("*.py"):
        for name in defined(path):
            found |= {name, name.rpartition(".")[2]}
        found |= {node.arg for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.arg)}
    return frozenset(found)


def unknown(name: str) -> bool:
    """Whether code that a page names in backticks is nowhere: a flag, a path, or a name of the library."""
    if name.startswith("--"):
        return name.split()[0][2:].removeprefix("no-").replace("-", "_") not in all_names()
    if "::" in name:
        path, _, inside = name.partition("::")
        return not (ROOT / path).is_file() or inside not in defined(ROOT / path)
    if "/" in name:
        return not (ROOT / name).exists()
    return not {name, name.removesuffix("()")} & all_names()


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    path, lost = PAGES[page], []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text(page)):
        target, _, anchor = link.partition("#")
        found = (path.parent / target) if target else path
        if not found.exists() or (anchor and anchor not in headings(found)):
            lost.append(link)
    assert lost == []


@pytest.mark.parametrize("page", OF_NOW)
def test_every_file_that_is_named_is_there(page: str) -> None:
    told = text(page)
    if page == "docs/architecture.md":  # the first column is the plan's
        told = re.sub(r"^\| .*? \|", "|", told, flags=re.M)
    named = set(re.findall(r"`((?:argonne|tests|benchmarks|examples|docs)/[\w/.-]*|[\w/]+\.py)`", told))
    folders = ("argonne", "examples", "benchmarks")
    files = [f"/{path.relative_to(ROOT)}" for folder in folders for path in (ROOT / folder).rglob("*.py")]
    known = {name for name in named if (ROOT / name).exists() or any(file.endswith(f"/{name}") for file in files)}
    assert sorted(named - known) == []


def test_the_readme_is_short_and_each_reason_for_it_has_a_link() -> None:
    assert len(text("README.md").splitlines()) < 200
    section = text("README.md").partition("## Why this one")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.*) \| (.*) \|$", section, re.M)[2:]
    assert 5 < len(rows) <= 12
    assert [row for row, shown in rows if "](" not in shown] == []


def test_every_proof_says_when_it_runs_and_what_runs_it() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", text("docs/proofs.md"), re.M)[2:]
    proofs = [row for row in rows if not row[0].startswith("**")]
    assert len(proofs) > 30
    for claim, shown, when in proofs:
        assert when in ("in CI", "on request"), claim
        runs_in_ci = bool(re.search(r"`tests/", shown)) and "test_older_transformers" not in shown
        assert runs_in_ci == (when == "in CI"), claim


def test_the_glossary_is_in_order_and_its_code_is_there() -> None:
    entries = re.findall(r"^- \*\*(.*?)\*\*: (.*)$", text("docs/glossary.md"), re.M)
    terms = [term for term, _ in entries]
    assert terms == sorted(terms, key=str.lower)
    assert len(set(terms)) == len(terms) > 40
    named = re.findall(r"`([^`]+)`", text("docs/glossary.md"))
    assert [name for name in named if unknown(name)] == []


def test_the_tour_names_every_room_and_every_file_in_it() -> None:
    tour = text("docs/tour.md")
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "argonne").rglob("__init__.py")}
    assert [room for room in sorted(rooms) if f"`{room}/`" not in tour] == []
    parts = re.split(r"`(argonne(?:/\w+)*)/`|^## ", tour, flags=re.M)
    described = {room: told for room, told in zip(parts[1::2], parts[2::2], strict=True) if room}
    missing = [
        f"{room}/{path.name}"
        for room in sorted(rooms)
        for path in sorted((ROOT / room).glob("*.py"))
        if path.stem != "__init__" and f"`{path.stem}`" not in described[room]
    ]
    assert missing == []


def test_the_tour_names_nothing_that_is_not_there() -> None:
    tour = text("docs/tour.md")
    named = set(re.findall(r"`([^`\n]+)`", tour))
    stems = {path.stem for path in (ROOT / "argonne").rglob("*.py")}
    written = {"run.json", "config.json", "metrics.jsonl", "model.layers.0.self_attn.q_proj.weight"}
    assert [name for name in sorted(named - written) if name not in stems and unknown(name)] == []
    assert len([name for name in named if "::" in name]) > 40
