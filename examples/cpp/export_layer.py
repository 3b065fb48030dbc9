"""Write spectral layers, two fine-tunes of them, and what they should compute, for main.cpp.

    python examples/cpp/export_layer.py exported

exported/layers.safetensors is what is frozen (see `export`); exported/first and exported/second hold delta files, as
`Adapter.save_weights` and `svdiff train` write them; exported/expected.safetensors is an input of each layer, and its
output under each of the two.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import svdiff
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from svdiff_kernels import SVDiffError
from svdiff_kernels.nn import SpectralConv2d, SpectralLinear, SpectralModule


def export(model: nn.Module, path: Path) -> None:
    """Write the frozen tensors of all spectral layers of a model that has been attached.

    Of each layer, by its path in the model: ``U``, ``sigma``, ``Vh`` (``[r, N]``, of a convolution ``[r, C_in, kh,
    kw]``), if there are any ``bias`` and, in the residual form, ``weight``; of a convolution ``geometry``, ``[3, 2]``
    integers: stride, padding, dilation.

    Raises:
        SVDiffError: the model has none, or one that main.cpp does not know.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, SpectralModule):
            continue
        plain = isinstance(layer, SpectralLinear) or (
            isinstance(layer, SpectralConv2d) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"
        )
        if not plain or layer.form == "recomposed":
            raise SVDiffError(f"{name} cannot be exported: only linear layers and convolutions, with zeros around them")
        factors = layer.factors()
        found = {"U": factors.U, "sigma": factors.sigma, "Vh": layer.Vh, "bias": layer.bias, "weight": layer.base}
        if isinstance(layer, SpectralConv2d):
            found["geometry"] = torch.tensor([layer.stride, layer.padding, layer.dilation])
        tensors |= {f"{name}.{key}": t.detach().cpu().contiguous() for key, t in found.items() if t is not None}
    if not tensors:
        raise SVDiffError("the model has no spectral layers: attach it first")
    write(tensors, path)


def write(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    save_file(tensors, partial)
    os.replace(partial, path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--rank", type=int, help="train this many singular values; all if not given")
    parser.add_argument("--seed", type=int, default=0, help="of weights, shifts and inputs")
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    model = nn.ModuleDict({"conv": nn.Conv2d(64, 96, 3, stride=2, padding=1), "linear": nn.Linear(320, 640)})
    inputs = {"conv": torch.randn(4, 64, 32, 32), "linear": torch.randn(4, 77, 320)}
    adapter = svdiff.attach(model, rank=arguments.rank, cache=False)
    export(model, arguments.folder / "layers.safetensors")

    expected = {f"{name}.x": x for name, x in inputs.items()}
    for fine_tune in ("first", "second"):
        for group in adapter.param_groups():
            for shifts in group["params"]:  # in place of training
                shifts.normal_(std=0.5)
        adapter.save_weights(arguments.folder / fine_tune)
        expected |= {f"{name}.{fine_tune}": model[name](x) for name, x in inputs.items()}
    write(expected, arguments.folder / "expected.safetensors")
    print(f"{arguments.folder}: {len(inputs)} layers, two fine-tunes of {adapter.num_parameters()} shifts each")


if __name__ == "__main__":
    main()
