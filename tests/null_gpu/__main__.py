"""Build the two libraries, and run a program with them in place of NVIDIA's."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
INSIDE = "NULL_GPU"
"""Is in the environment of the process that runs the program."""


def build(folder: Path) -> None:
    """Make the libraries in ``folder``, with a function that returns 0 for every name that is asked for elsewhere.

    Raises:
        subprocess.CalledProcessError: the compiler or ``nm`` has said why on stderr.
    """
    import torch
    import triton

    packages = Path(torch.__file__).parents[1]
    nvidia = Path(triton.__file__).parent / "backends" / "nvidia"
    # The structures are those of PyTorch's own CUDA; Triton's headers are of another, and complete.
    headers = [next(packages.glob("nvidia/*/include/cuda_runtime_api.h")).parent, nvidia / "include"]
    libraries = sorted((packages / "torch" / "lib").glob("*.so"))
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", *map(str, libraries)], capture_output=True, text=True, check=True
    ).stdout
    of_runtime = set(re.findall(r"\bU ((?:cuda|cublas)[A-Z]\w+)", listing))
    # The driver's are looked up by name: the names are strings in the libraries, and in what Triton compiles.
    told = b"".join(path.read_bytes() for path in libraries if "cuda" in path.name)
    of_driver = {name.decode() for name in re.findall(rb"\0(cu[A-Z]\w+)(?=\0)", told)}
    for source in ("driver.c", "driver.py"):
        of_driver |= set(re.findall(r"\bcu[A-Z]\w+", (nvidia / source).read_text()))
    of_driver |= set(re.findall(r"\bU (cu[A-Z]\w+)", listing))
    of_driver = {name for name in of_driver if not name.endswith("_t")}
    for source, names, library in (("runtime", of_runtime, "libnull.so"), ("driver", of_driver, "libcuda.so.1")):
        text = (HERE / f"{source}.c").read_text()
        own = set(re.findall(r"^[\w *]*?\b((?:cu|__cuda)\w+)\(", text, re.MULTILINE))
        rest = folder / f"{source}_rest.c"
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in sorted(names - own)))
        made = [
            *(f"-I{path}" for path in headers),
            f"-Wl,-soname,{library}",
            "-o",
            folder / library,
            HERE / f"{source}.c",
            rest,
        ]
        subprocess.run(["cc", "-O2", "-w", "-shared", "-fPIC", *made], check=True)


def outside(words: list[str]) -> int:
    """Run the program in a process that finds the libraries; its exit status."""
    import torch

    problem = None
    if not words:
        problem = "there is nothing to run; legal: a script or -m and a module, and its flags"
    elif missing := [tool for tool in ("cc", "nm") if shutil.which(tool) is None]:
        problem = f"{' and '.join(missing)} not found; legal: a machine with a C compiler and binutils"
    elif torch.version.cuda is None:
        problem = f"torch {torch.__version__} is not built for CUDA; legal: one that is, such as torch 2.11.0+cu130"
    elif torch.cuda.is_available():
        problem = "there is a GPU, which computes; legal: a machine without one"
    if problem:
        print(f"null GPU: error: {problem}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as made:
        build(Path(made))
        path = os.environ.get("LD_LIBRARY_PATH")
        environment = {
            **os.environ,
            INSIDE: "1",
            "LD_PRELOAD": f"{made}/libnull.so",
            "LD_LIBRARY_PATH": f"{made}:{path}" if path else made,
            "TRITON_LIBCUDA_PATH": made,
            "TRITON_CACHE_DIR": f"{made}/triton",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "0",
        }
        Path(made, "libcuda.so").symlink_to("libcuda.so.1")
        return subprocess.run([sys.executable, "-m", "tests.null_gpu", *words], env=environment, check=False).returncode


def inside(words: list[str]) -> None:
    """Run ``-m module`` or a script, as Python would."""
    import torch

    torch.backends.cuda.enable_cudnn_sdp(False)  # cuDNN is NVIDIA's own, and finds no GPU
    is_module = words[0] == "-m"
    sys.argv = words[is_module:]
    if is_module:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    if INSIDE in os.environ:
        inside(sys.argv[1:])
    else:
        sys.exit(outside(sys.argv[1:]))
