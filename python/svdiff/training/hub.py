"""Sharing what has been learnt: a model card, and the upload to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from svdiff_kernels import SVDiffError

from .config import TrainConfig, default_hub_id


class _Kind(NamedTuple):
    """What a method's files are called, and how they are loaded into a pipeline of diffusers."""

    what: str
    tag: str
    imports: str
    load: str


_DIFFUSERS = "from diffusers import DiffusionPipeline"
_DOWNLOADED = "from huggingface_hub import snapshot_download"
_PRETRAINED = 'pipeline = DiffusionPipeline.from_pretrained("{base}")'
_KINDS: dict[str, _Kind] = {
    "svdiff": _Kind(
        "Spectral shifts (SVDiff)",
        "svdiff",
        f"import svdiff\n{_DIFFUSERS}\n{_DOWNLOADED}",
        f'{_PRETRAINED}\nsvdiff.load(pipeline, snapshot_download("{{repository}}"))',
    ),
    "lora": _Kind("A LoRA", "lora", _DIFFUSERS, f'{_PRETRAINED}\npipeline.load_lora_weights("{{repository}}")'),
    "full": _Kind(
        "All weights",
        "dreambooth",
        _DIFFUSERS,
        'pipeline = DiffusionPipeline.from_pretrained("{repository}", subfolder="pipeline")',
    ),
    "custom_diffusion": _Kind(
        "Keys and values of cross-attention (Custom Diffusion)",
        "custom-diffusion",
        f"{_DIFFUSERS}\n{_DOWNLOADED}\nfrom svdiff import custom_diffusion",
        f'{_PRETRAINED}\ncustom_diffusion.load(pipeline, snapshot_download("{{repository}}"))',
    ),
    "textual_inversion": _Kind("New words", "textual_inversion", _DIFFUSERS, _PRETRAINED),
}


def write_model_card(
    directory: Path, config: TrainConfig, *, prompts: list[str], steps: int, num_parameters: int
) -> None:
    """``README.md`` with the metadata that the hub reads, how to use the files, and how they came about."""
    from huggingface_hub import ModelCard, ModelCardData

    repository, base = default_hub_id(config), config.pretrained_model_name_or_path
    is_hub_id = "/" in base and not Path(base).expanduser().exists()
    base = base if is_hub_id else Path(base).name  # a card is shared, folders are private
    kind = _KINDS[config.method]
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", kind.tag],
        instance_prompt=prompts[0],
    )
    use = _use(config, kind).format(base=base, repository=repository, prompt=prompts[0])
    grids = sorted(directory.glob("validation/*.png"))
    pictures = (
        f"\n![{', '.join(config.validation_prompt or [])}]({grids[-1].relative_to(directory)})\n" if grids else ""
    )
    what = f"{kind.what}{' and new words' if config.modifier_token and kind.load != _PRETRAINED else ''}"
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


def _use(config: TrainConfig, kind: _Kind) -> str:
    imports, loads = kind.imports, kind.load
    if config.modifier_token:
        lines = {*imports.splitlines(), "import svdiff", _DOWNLOADED}
        imports = "\n".join(sorted(lines, key=lambda line: (not line.startswith("import"), line)))
        loads += '\nsvdiff.load_tokens(pipeline, snapshot_download("{repository}"))'
    return f'{imports}\n\n{loads}\npipeline("{{prompt}}").images[0]'


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
