"""svdiff evaluate: how good pictures are, by the measures of the field, each with an interval.

Pictures come from folders, as svdiff generate writes them, or are drawn first by a base model with and without shifts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from svdiff_kernels import SVDiffError

from .evaluation.measuring import MEASURES, Entry, Measurement, Networks
from .evaluation.obstacles import obstacle
from .evaluation.pictures import Judged, check_pairs, judged_pictures
from .evaluation.table import KINDS, Figure, text_table
from .extras import lacking
from .generate import GenerateConfig, generate
from .generate import check as check_drawing
from .miniature import NAME as MINIATURE
from .mixtures import named_paths
from .outputs import run_directory, write_run_file, writing
from .sampling import wanted_pictures

BASE = "base"
"""What the entry of a base model without shifts is called."""

_DRAWN, _CLASS_DRAWN = "pictures", "class_pictures"  # folders in output_dir, with a folder for each entry


@dataclass
class EvaluateConfig:
    """Settings of `evaluate`; each is a flag of ``svdiff evaluate``."""

    pictures: list[str] | None = field(
        default=None,
        metadata={
            "help": "folders of pictures to judge, of svdiff generate, or with captions as training folders have them; "
            "several are compared; also as name=path"
        },
    )
    output_dir: str = field(default="outputs/evaluate", metadata={"help": "a new folder for figures and report"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier run in output_dir"})
    reference_dir: str | None = field(default=None, metadata={"help": "the subject's pictures, to compare with"})
    class_pictures: list[str] | None = field(
        default=None,
        metadata={"help": "of prompts for other things than the subject, a folder for each of pictures, as name=path"},
    )
    base_class_pictures: str | None = field(
        default=None, metadata={"help": "the base model's of the same prompts and seeds, to tell what moved"}
    )
    modifier_token: list[str] | None = field(
        default=None,
        metadata={"help": "words to leave out of prompts for text alignment, such as sks: CLIP does not know them"},
    )
    metrics: list[str] | None = field(
        default=None, metadata={"help": f"which; default: all that can be computed of {', '.join(KINDS)}"}
    )

    clip: str | None = field(default=None, metadata={"help": "a CLIP model: folder, hub id, or miniature"})
    dino: str | None = field(default=None, metadata={"help": "a DINO, DINOv2 or DINOv3 model: folder or hub id"})
    inception: str | None = field(
        default=None, metadata={"help": "weights of FID's Inception-v3, one safetensors file"}
    )
    lpips: str | None = field(default=None, metadata={"help": "weights of LPIPS, one safetensors file"})
    subject: str | None = field(
        default=None, metadata={"help": "of the miniature's world, such as mushroom: in how many pictures it is seen"}
    )

    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "draw the pictures first, with this: folder, hub id, or miniature"}
    )
    spectral_shifts_ckpt: list[str] | None = field(
        default=None, metadata={"help": "folders or files with trained shifts to judge, also as name=path"}
    )
    prompt: list[str] | None = field(default=None, metadata={"help": "what to draw of the subject"})
    class_prompt: list[str] | None = field(
        default=None, metadata={"help": "what to draw of other things, to tell what the shifts moved besides"}
    )
    num_images_per_prompt: int = field(default=4, metadata={"help": "pictures of each prompt"})
    num_inference_steps: int = field(default=50, metadata={"help": "steps of the scheduler"})
    guidance_scale: float | None = field(default=None, metadata={"help": "as of svdiff generate"})
    scheduler_type: str | None = field(default=None, metadata={"help": "as of svdiff generate"})
    dtype: Literal["fp32", "fp16", "bf16"] = field(default="fp32", metadata={"help": "as of svdiff generate"})
    svd_cache_dir: str | None = field(default=None, metadata={"help": "as of svdiff generate"})

    confidence: float = field(default=0.95, metadata={"help": "of the intervals"})
    resamples: int = field(
        default=1000, metadata={"help": "of the pictures, for the intervals (FID, which is slow, at most 200)"}
    )
    seed: int = field(default=0, metadata={"help": "of the first picture drawn, and of the resamples"})
    batch_size: int = field(default=16, metadata={"help": "pictures at a time"})
    device: str = field(default="auto", metadata={"help": "cpu, cuda, ...; auto: the accelerator, if there is one"})


@dataclass(frozen=True)
class EvaluateResult:
    """What `evaluate` measured.

    Attributes:
        output_dir: the folder, with ``metrics.json``, ``report.html`` and ``report.png``.
        figures: all of them.
        left_out: metrics that could not be computed, and why.
    """

    output_dir: Path
    figures: list[Figure]
    left_out: dict[str, str]

    def __str__(self) -> str:
        return f"{text_table(self.figures)}\nlook at {self.output_dir / 'report.html'}"


def evaluate(config: EvaluateConfig) -> EvaluateResult:
    """Measure pictures, and write figures and a report into a new folder, which appears when all is done.

    Raises:
        SVDiffError: anything wrong with the settings, the pictures or the models; no folder is made then.
    """
    try:
        from .evaluation import plots, report
    except ModuleNotFoundError as error:
        raise lacking(error, "svdiff.evaluate") or error from error

    check(config)
    references = judged_pictures(config.reference_dir) if config.reference_dir else []
    draws = config.pretrained_model_name_or_path is not None
    entries, base = _planned(config, Path()) if draws else _given(config)
    left_out = _left_out(config, entries, references, base)  # before anything is loaded or drawn
    with run_directory(config.output_dir, overwrite=config.overwrite) as staging:
        networks = Networks(config, clip_of(config))
        if draws:
            for drawings in _drawings(config, staging).values():
                for drawing in drawings:
                    generate(drawing)
            entries, base = _planned(config, staging)
        figures = [
            figure
            for entry in entries
            for metric in KINDS
            if metric not in left_out
            for figure in MEASURES[metric](Measurement(config, networks, entry, references, base, metric))
        ]
        strips: dict[str, Sequence[Judged]] = {"the subject's pictures": references} if references else {}
        strips |= {entry.name: entry.pictures for entry in entries}
        if base:
            strips |= {f"class prompts, {BASE}": base}
            strips |= {f"class prompts, {entry.name}": entry.class_pictures for entry in entries}
        plot, sources = plots.draw(figures), networks.sources
        unasked = {} if config.metrics else left_out
        text = report.page(figures, plot, strips, sources=sources, left_out=unasked, confidence=config.confidence)
        told = {
            "metrics": [figure.as_json() for figure in figures],
            "left_out": unasked,
            "features": sources,
            "confidence": config.confidence,
            "resamples": config.resamples,
            "seed": config.seed,
        }
        with writing(staging):
            (staging / "report.png").write_bytes(plot)
            (staging / "report.html").write_text(text, encoding="utf-8")
            (staging / "metrics.json").write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        write_run_file(staging, "evaluate", asdict(config), figures=len(figures))
    return EvaluateResult(Path(config.output_dir), figures, unasked)


def check(config: EvaluateConfig) -> None:
    """Raises SVDiffError if something makes no sense, before a picture is read or a model loaded."""
    draws = config.pretrained_model_name_or_path is not None
    if draws == bool(config.pictures):
        raise SVDiffError("what is to be judged? Give either pictures, or pretrained_model_name_or_path to draw them")
    for name in ("spectral_shifts_ckpt", "prompt", "class_prompt"):
        if getattr(config, name) and not draws:
            raise SVDiffError(f"{name} is of drawing pictures, which needs pretrained_model_name_or_path")
    for name in ("class_pictures", "base_class_pictures"):
        if getattr(config, name) and draws:
            raise SVDiffError(f"{name} are drawn from class_prompt here: leave them out")
    if bool(config.class_pictures) != bool(config.base_class_pictures):
        raise SVDiffError("class_pictures and base_class_pictures belong together: what moved is told by both")
    for name in ("batch_size", "resamples", "num_images_per_prompt", "num_inference_steps"):
        if getattr(config, name) < 1:
            raise SVDiffError(f"{name} must be at least 1, not {getattr(config, name)}")
    if not 0 < config.confidence < 1:
        raise SVDiffError(f"confidence must be between 0 and 1, not {config.confidence}")
    for metric in config.metrics or []:
        if metric not in KINDS:
            raise SVDiffError(f"metric {metric!r} is not one of {', '.join(KINDS)}")
    if config.subject is not None:
        from .miniature import world

        if clip_of(config) != MINIATURE:
            raise SVDiffError("subject is of the miniature's world: it needs clip miniature, or the miniature to draw")
        if config.subject not in world.SUBJECTS:
            raise SVDiffError(f"subject {config.subject!r} is not one of {', '.join(sorted(world.SUBJECTS))}")
    if draws:
        if not config.prompt:
            raise SVDiffError("prompt is missing: what is to be drawn?")
        for drawings in _drawings(config, Path()).values():
            for drawing in drawings:
                check_drawing(drawing)


def clip_of(config: EvaluateConfig) -> str | None:
    """The miniature is judged by its own encoder, unless another is named."""
    return config.clip or (MINIATURE if config.pretrained_model_name_or_path == MINIATURE else None)


def _given(config: EvaluateConfig) -> tuple[list[Entry], list[Judged]]:
    """The entries of folders that there are, and the base model's class pictures."""
    pictures, classes = (named_paths(given or [], "folder") for given in (config.pictures, config.class_pictures))
    if len(pictures) == len(classes) == 1:
        classes = dict(zip(pictures, classes.values(), strict=True))  # no name is needed to tell whose they are
    if classes and classes.keys() != pictures.keys():
        raise SVDiffError(
            f"pictures are of {', '.join(pictures)}, but class_pictures of {', '.join(classes)}: give both as name=path"
        )
    base = judged_pictures(config.base_class_pictures) if config.base_class_pictures else []
    entries = []
    for name, path in pictures.items():
        entries.append(Entry(name, judged_pictures(path), judged_pictures(classes[name]) if classes else []))
        if classes:
            check_pairs(entries[-1].class_pictures, base, name)
    return entries, base


def _planned(config: EvaluateConfig, folder: Path) -> tuple[list[Entry], list[Judged]]:
    """The pictures that are to be drawn of the base model and of each delta file, and the base's class pictures."""
    entries = []
    for name, drawings in _drawings(config, folder).items():
        found = [_pictures_of(drawing) for drawing in drawings]
        entries.append(Entry(name, found[0], found[1] if len(found) > 1 else []))
    return entries, entries[0].class_pictures


def _pictures_of(drawing: GenerateConfig) -> list[Judged]:
    wanted = wanted_pictures(drawing.prompt, drawing.num_images_per_prompt, drawing.seed)
    return [Judged(Path(drawing.output_dir) / picture.file, picture.prompt, picture.seed) for picture in wanted]


def _drawings(config: EvaluateConfig, folder: Path) -> dict[str, list[GenerateConfig]]:
    """What is to be drawn for each entry, from the same prompts and seeds: pictures, and class pictures if asked."""
    shifts = named_paths(config.spectral_shifts_ckpt or [])
    if BASE in shifts:
        raise SVDiffError(f"{BASE!r} is the name of the model without shifts: say name=path for {shifts[BASE]}")
    wanted = {_DRAWN: config.prompt, _CLASS_DRAWN: config.class_prompt}
    return {
        name: [
            GenerateConfig(
                config.pretrained_model_name_or_path or "",
                prompts,
                output_dir=str(folder / kind / name),
                spectral_shifts_ckpt=None if path is None else [path],
                num_images_per_prompt=config.num_images_per_prompt,
                batch_size=config.batch_size,
                num_inference_steps=config.num_inference_steps,
                guidance_scale=config.guidance_scale,
                scheduler_type=config.scheduler_type,
                seed=config.seed,
                dtype=config.dtype,
                device=config.device,
                svd_cache_dir=config.svd_cache_dir,
            )
            for kind, prompts in wanted.items()
            if prompts
        ]
        for name, path in ({BASE: None} | shifts).items()
    }


def _left_out(
    config: EvaluateConfig, entries: Sequence[Entry], references: Sequence[Judged], base: Sequence[Judged]
) -> dict[str, str]:
    """Metrics that cannot be computed, or are not asked for, and why.

    Raises:
        SVDiffError: one that is asked for cannot be computed, or none can.
    """
    found = {
        metric: why for metric in KINDS if (why := obstacle(metric, config, clip_of(config), entries, references, base))
    }
    if config.metrics:
        for metric in config.metrics:
            if metric in found:
                raise SVDiffError(f"{metric} cannot be computed: {found[metric]}")
        return {metric: found.get(metric, "not asked for") for metric in KINDS if metric not in config.metrics}
    if len(found) == len(KINDS):
        raise SVDiffError(f"nothing can be measured; text_alignment: {found['text_alignment']}; kid: {found['kid']}")
    return found
