"""``python -m svdiff_kernels.info``: what is built, what is used, and what is missing and why."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import version

import torch

from . import __version__, backends
from .cache import FactorCache


def info() -> dict[str, str]:
    """The facts that a bug report needs, in the order to print them."""
    facts = {
        "svdiff_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "SVDIFF_BACKEND": os.environ.get("SVDIFF_BACKEND", "auto (not set)"),
    }
    compiler = os.environ.get("CXX", "c++")
    facts["C++ compiler"] = shutil.which(compiler.split()[0]) or f"none ({compiler!r} is not on the PATH)"
    if backends.extension is None:
        facts["extension"] = f"not used: {backends.why_no_extension}"
    else:
        built = backends.extension.build_info()
        facts["extension"] = f"built against torch {built['torch']} with {built['compiler']}, OpenMP {built['openmp']}"
        if built["torch"] != torch.__version__.split("+")[0]:
            facts["extension"] += f" (but torch {torch.__version__} is installed: reinstall svdiff-kernels)"
        facts["fp32 products on cpu"] = "oneDNN" if backends.extension.prefers_onednn() else "torch's own"
    if backends.why_no_cuda or backends.extension is None:
        facts["cuda kernels"] = f"not used: {backends.why_no_cuda}"
    else:
        facts["cuda kernels"] = backends.extension.build_info()["cuda"]
    facts["triton"] = f"not used: {backends.why_no_triton}" if backends.why_no_triton else version("triton")
    facts["expand on cpu"] = backends.serving("cpu")
    facts["expand on cuda"] = backends.serving("cuda") if torch.cuda.is_available() else "no device"
    facts["factor cache"] = str(FactorCache().dir)
    return facts


def main() -> None:
    """Print `info`, one fact a line."""
    facts = info()
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:<{width}}  {value}")


if __name__ == "__main__":
    main()
