"""Train the shifts of a diffusion model with Lightning: four pictures of a thing that the built-in model does not know.

    python examples/lightning/train.py
    python examples/lightning/train.py --epochs 8 --resume    # goes on from the last checkpoint

The optimiser has two flat parameters, and so has a checkpoint; beside it is the delta file, which is what people share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import svdiff
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from svdiff.miniature import load_pipeline
from svdiff.miniature.task import Task
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

BATCH = 8


class ShiftTraining(L.LightningModule):
    """Asks a UNet for the noise in noisy latents; only its shifts train."""

    def __init__(self, pipe: Any, adapter: svdiff.Adapter, lr: float, lr_1d: float, seed: int) -> None:
        super().__init__()
        self.unet, self.adapter, self.rates, self.seed = pipe.unet, adapter, (lr, lr_1d), seed
        self.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
        self.strict_loading = False  # the frozen weights are not in a checkpoint

    def configure_optimizers(self) -> torch.optim.Optimizer:
        lr, lr_1d = self.rates
        return torch.optim.AdamW(self.adapter.param_groups(lr=lr, lr_1d=lr_1d), weight_decay=0.0)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What trains: two vectors."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def loss(self, latents: Tensor, prompts: Tensor, seed: int) -> Tensor:
        """Of answers to questions that the seed decides: a run that goes on asks what it would have asked."""
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        count = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(count, latents.shape[:1], generator=generator).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return F.mse_loss(self.unet(noisy, timesteps, prompts).sample, target)

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        loss = self.loss(*batch, seed=1_000_000 * (self.seed + 1) + self.global_step)
        self.log("loss", loss, on_epoch=True, on_step=False)
        return loss

    def on_train_epoch_end(self) -> None:
        print(f"epoch {self.current_epoch}: {self.global_step} steps, loss {self.trainer.callback_metrics['loss']:.4f}")


class DeltaFiles(Callback):
    """Writes the delta file whenever there is a checkpoint."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.is_global_zero:
            pl_module.adapter.save_weights(self.directory)


@torch.no_grad()
def encoded(pipe: Any) -> TensorDataset:
    """Latents and prompts of four pictures of a mushroom, which the miniature has never seen."""
    task = Task(("mushroom",))
    with tempfile.TemporaryDirectory() as folder:
        pictures = task.write_pictures(Path(folder, "pictures"), "mushroom")
        lines = Path(folder, "pictures", "metadata.jsonl").read_text().splitlines()
    images = torch.stack([torch.from_numpy(np.array(picture.convert("RGB"))) for picture in pictures])
    latents = pipe.vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latents * pipe.vae.config.scaling_factor
    prompts, _ = pipe.encode_prompt([json.loads(line)["text"] for line in lines], "cpu", 1, False)
    return TensorDataset(latents, prompts)


@torch.no_grad()
def validate(module: ShiftTraining, data: TensorDataset) -> float:
    """The loss on 64 questions, the same each time."""
    module.eval()
    repeats = 64 // len(data)
    latents, prompts = (tensor.repeat_interleave(repeats, 0).to(module.device) for tensor in data.tensors)
    loss = module.loss(latents, prompts, seed=0).item()
    module.train()
    return loss


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=4, help="up to this one")
    parser.add_argument("--steps", type=int, default=25, help="of each epoch")
    parser.add_argument("--lr", type=float, default=1e-2, help="of matrices; 1e-3 for a model of common size")
    parser.add_argument("--lr_1d", type=float, default=1e-2, help="of norms; 1e-6 for a model of common size")
    parser.add_argument("--seed", type=int, default=0, help="of noise and timesteps")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/lightning"))
    parser.add_argument("--resume", action="store_true", help="go on from output_dir/last.ckpt")
    options = parser.parse_args(arguments)
    last = options.output_dir / "last.ckpt"
    if options.resume and not last.is_file():
        parser.error(f"there is no {last} to go on from")

    pipe = load_pipeline()
    data = encoded(pipe)
    adapter = svdiff.attach(pipe)
    module = ShiftTraining(pipe, adapter, options.lr, options.lr_1d, options.seed)
    epoch = ConcatDataset([data] * (options.steps * BATCH // len(data)))
    print(f"{adapter.num_parameters():,} shifts; loss before {validate(module, data):.4f}")

    trainer = L.Trainer(
        max_epochs=options.epochs,
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=options.output_dir,
        callbacks=[ModelCheckpoint(options.output_dir, save_top_k=0, save_last=True), DeltaFiles(options.output_dir)],
    )
    # weights_only: the checkpoint is not to run code.
    trainer.fit(module, DataLoader(epoch, BATCH), ckpt_path=last if options.resume else None, weights_only=True)
    file = options.output_dir / "spectral_shifts.safetensors"
    print(f"loss after {validate(module, data):.4f}")
    print(f"{file}: {file.stat().st_size:,} bytes; {last}: {last.stat().st_size:,}")


if __name__ == "__main__":
    main()
