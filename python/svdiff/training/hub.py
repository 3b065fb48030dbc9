"""Sharing what has been learnt: a model card, and the upload to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from svdiff_kernels import SVDiffError

from .config import TrainConfig, default_hub_id

_USE = {
    "svdiff": """import svdiff
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download

pipeline = DiffusionPipeline.from_pretrained("{base}")
svdiff.load(pipeline, snapshot_download("{repository}"))
pipeline("{prompt}").images[0]""",
    "lora": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("{repository}")
pipeline("{prompt}").images[0]""",
    "full": """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repository}", subfolder="pipeline")
pipeline("{prompt}").images[0]""",
}


def write_model_card(
    directory: Path, config: TrainConfig, *, prompts: list[str], steps: int, num_parameters: int
) -> None:
    """``README.md`` with the metadata that the hub reads, how to use the files, and how they came about."""
    from huggingface_hub import ModelCard, ModelCardData

    repository, base = default_hub_id(config), config.pretrained_model_name_or_path
    is_hub_id = "/" in base and not Path(base).expanduser().exists()
    base = base if is_hub_id else Path(base).name  # a card is shared, folders are private
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", {"svdiff": "svdiff", "lora": "lora", "full": "dreambooth"}[config.method]],
        instance_prompt=prompts[0],
    )
    use = _USE[config.method].format(base=base, repository=repository, prompt=prompts[0])
    grids = sorted(directory.glob("validation/*.png"))
    pictures = (
        f"\n![{', '.join(config.validation_prompt or [])}]({grids[-1].relative_to(directory)})\n" if grids else ""
    )
    what = {"svdiff": "Spectral shifts (SVDiff)", "lora": "A LoRA", "full": "All weights"}[config.method]
    content = f"""---
{data.to_yaml()}
---

# {repository}

{what} of {base}, learnt from the prompts {", ".join(f"*{prompt}*" for prompt in prompts[:8])}.
{pictures}
## Use

```python
{use}
```

## How it was made

`svdiff train`: {steps} steps, {num_parameters:,} numbers trained, learning rate {config.learning_rate:g}, batch
{config.train_batch_size}, seed {config.seed}{", with prior preservation" if config.with_prior_preservation else ""}.
`run.json` has every setting.
"""
    ModelCard(content).save(directory / "README.md")


def push(directory: Path, config: TrainConfig) -> str:
    """Upload the folder of a run, without its checkpoints and training pictures; returns where it is.

    Raises:
        SVDiffError: the hub refuses, or cannot be reached. The folder stays.
    """
    from huggingface_hub import HfApi

    api: Any = HfApi()
    try:
        repository = api.create_repo(default_hub_id(config), private=config.hub_private, exist_ok=True).repo_id
        api.upload_folder(
            repo_id=repository,
            folder_path=directory,
            commit_message="svdiff train",
            ignore_patterns=["checkpoint-*", "class_images/*", f"{config.logging_dir}/*", ".*"],
        )
    except Exception as error:  # of the client, of what it is built on, or of the network
        reason = " ".join(str(error).split())
        raise SVDiffError(f"cannot push to the hub ({reason}); everything is in {directory}") from error
    return str(repository)
