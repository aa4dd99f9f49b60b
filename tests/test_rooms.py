"""The rooms of the house: imports point down and form no circle, and every file can be read in one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "argonne": {"parent"},
    "parent": set(),
    "files": set(),
    "output": {"files"},
    "parallel": {"argonne", "parent"},
    "kernels": {"parallel"},
    "launch": {"argonne", "parent", "output", "parallel"},
    "data": {"parent", "files", "parallel"},
    "checkpoint": {"files", "parallel"},
    "models": {"files", "parallel", "kernels"},
    "inference": {"files", "output", "parallel", "kernels", "data", "checkpoint", "models"},
    "convert": {"files", "parallel", "kernels", "models", "data", "checkpoint"},
    "training": {
        *("argonne", "parent", "files", "output", "parallel", "kernels", "launch"),
        *("data", "checkpoint", "models", "inference"),
    },
    "compare": {"argonne", "files", "output", "parallel", "launch", "checkpoint", "training"},
    "__main__": {"argonne", "output", "parallel", "launch", "compare"},
}
"""What each package (``argonne``: the root itself) may import besides itself, however deep the import stands."""

WITHIN_PARALLEL: dict[str, set[str]] = {
    "communication": set(),
    "sharding": {"communication"},
    "tensor_parallel": {"communication", "sharding"},
    "data_parallel": {"communication", "sharding", "tensor_parallel"},
    "pipeline_parallel": {"communication", "tensor_parallel"},
    "context_parallel": {"communication"},
}
WITHIN_DATA: dict[str, set[str]] = {
    "corpus": set(),
    "tokens": set(),
    "lanes": {"corpus", "tokens"},
    "cache": {"corpus", "tokens", "lanes"},
    "chat": {"lanes", "tokens", "corpus"},
}
ROOMS_WITHIN = {"parallel": WITHIN_PARALLEL, "data": WITHIN_DATA}
"""What each room of a package may import besides itself and the files beside the rooms (``errors``, ``legal``)."""

MOST_LINES = 350
Graph = Mapping[str, set[str]]


def modules_under(root: Path, package: str) -> dict[str, Path]:
    """Every module of ``package`` (a folder of ``root``) by its full name."""
    found = {}
    for path in sorted((root / package).rglob("*.py")):
        found[".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")] = path
    return found


def imports(path: Path, name: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """The modules that a file names in imports anywhere in it: in functions and under ``TYPE_CHECKING`` too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found = [f"{base}.{a.name}" if f"{base}.{a.name}" in modules else base for a in node.names]
        else:
            continue
        yield from (module for module in found if module in modules and module != name)


def graph_of(root: Path, package: str) -> dict[str, set[str]]:
    modules = modules_under(root, package)
    return {name: set(imports(path, name, modules)) for name, path in modules.items()}


def circle_in(graph: Graph) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty if there are none."""
    done: set[str] = set()

    def search(module: str, way: list[str]) -> list[str]:
        if module in way:
            return [*way[way.index(module) :], module]
        if module in done:
            return []
        for imported in sorted(graph[module]):
            if found := search(imported, [*way, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := search(module, []))), [])


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return graph_of(ROOT, "argonne")


def test_imports_form_no_circle(graph: Graph) -> None:
    assert len(graph) > 100
    assert not (found := circle_in(graph)), " -> ".join(found)


def test_packages_import_only_what_lies_below_them(graph: Graph) -> None:
    assert {package_of(module) for module in graph} == set(MAY_IMPORT)
    upward = [
        f"{module} imports {imported}"
        for module, found in graph.items()
        for imported in sorted(found)
        if package_of(imported) not in MAY_IMPORT[package_of(module)] | {package_of(module)}
    ]
    assert not upward, "\n".join(upward)


def test_the_order_of_the_packages_is_one() -> None:
    assert not circle_in(MAY_IMPORT)


@pytest.mark.parametrize("package", ROOMS_WITHIN)
def test_the_rooms_of_a_package_import_downwards(graph: Graph, package: str) -> None:
    below = ROOMS_WITHIN[package]

    def room(module: str) -> str:
        parts = module.split(".")
        inside = parts[:2] == ["argonne", package] and len(parts) > 2
        return parts[2] if inside and (ROOT.joinpath(*parts[:3]).is_dir()) else ""

    assert {room(module) for module in graph} == {"", *below}
    for module, found in graph.items():
        if here := room(module):
            wrong = {i for i in found if room(i) not in below[here] | {here, ""}}
            assert not wrong, f"{module} imports {sorted(wrong)}"
            assert f"argonne.{package}" not in found, f"{module} imports what imports it"
    assert not circle_in(below)


def test_examples_import_no_tests_and_no_benchmarks_and_nothing_imports_them() -> None:
    for room in ("argonne", "examples", "benchmarks"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                taken = {name.split(".")[0] for name in names} & {"tests", "examples", "benchmarks"}
                assert taken <= ({"benchmarks", "tests"} if room == "benchmarks" else {room}), f"{path}: {taken}"


def test_no_file_is_longer_than_can_be_read_in_one_sitting() -> None:
    rooms = ("argonne", "tests", "benchmarks", "examples")
    lines = {
        path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines())
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
    }
    assert not {name: count for name, count in lines.items() if count > MOST_LINES}


PLANTED = {
    "at the top": "from house.low import x",
    "of a package's member": "from house import low",
    "by a relative path": "from .low import x",
    "by a relative path of its own": "from . import low",
    "by its full name": "import house.low",
    "for type hints alone": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from house.low import x",
    "within a function": "def f():\n    from house.low import x",
}


@pytest.mark.parametrize("way", PLANTED)
def test_a_circle_is_found_however_it_is_imported(tmp_path: Path, way: str) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").write_text("")
    (tmp_path / "house" / "middle.py").write_text("import house.high\n")
    (tmp_path / "house" / "low.py").write_text("x = 1\n")
    (tmp_path / "house" / "high.py").write_text(PLANTED[way])
    assert circle_in(graph_of(tmp_path, "house")) == []
    (tmp_path / "house" / "low.py").write_text("from house import middle\n")
    found = circle_in(graph_of(tmp_path, "house"))
    assert set(found) == {"house.high", "house.low", "house.middle"}
    assert found[0] == found[-1]
