"""Frozen weights that no process holds whole: each keeps a part, and a block's are gathered just before it computes."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..attached import MATRIX_LAYERS


def shard_frozen(model: nn.Module, device: torch.device) -> None:
    """Spread what is frozen in an attached model over all processes, by FSDP2; what trains stays whole in each.

    A block's weights are together again while it computes, forward and backward. Every process must call the model as
    often as any other. It can be trained, asked, and its shifts saved; its adapter cannot be taken off any more.

    Args:
        model: with spectral layers, which may have deferred their factors: one block's at a time come to the device.
        device: of this process.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    # Said of blocks whose answer is a view, as a spectral convolution's may be: nobody adds to it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model.get_submodule("spectral_bank").to(device)
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    names = set(getattr(model, "_no_split_modules", None) or ())  # the library's word for blocks
    blocks = [module for module in model.modules() if type(module).__name__ in names]
    for block in (*reversed(blocks), model):  # the inner ones first
        for layer in block.modules():
            if isinstance(layer, tuple(MATRIX_LAYERS.values())) and "U" in layer._buffers:
                _make_parameters(layer.to(device))
        fully_shard(block, mesh=mesh, ignored_params=trained, reshard_after_forward=True)


def _make_parameters(layer: Any) -> None:
    """Have a layer's matrices as parameters, since FSDP leaves buffers alone."""
    layer.ready()
    for name, buffer in list(layer.named_buffers(recurse=False)):
        if buffer.dim() > 1:
            delattr(layer, name)
            layer.register_parameter(name, nn.Parameter(buffer, requires_grad=False))
