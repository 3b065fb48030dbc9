"""The tab that draws: prompts, and how much of each run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import gradio as gr

from svdiff_kernels import SVDiffError

from ..generate import GenerateConfig, check
from ..pipelines import SCHEDULERS
from ..sampling import wanted_pictures
from . import look
from .artist import Artist
from .child import arguments
from .runs import Runs

_OWN = "the model's own"


class GenerateTab:
    """Components and what they do.

    Args:
        page: that it is a part of.
        tab: itself.
        runs: whose adapters have sliders.
        artist: draws.
        suggested: settings for the fields at first.
    """

    def __init__(self, page: Any, tab: Any, runs: Runs, artist: Artist, suggested: GenerateConfig) -> None:
        self._runs, self._artist, self._suggested = runs, artist, suggested
        names = gr.State([])
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._build_weights(names)
                look_for = gr.Button("Look for runs", size="sm", elem_id="generate-refresh")
                self._build_inputs()
            with gr.Column(scale=6, min_width=320):
                self._build_outputs()
        for event in (page.load, tab.select, look_for.click):
            event(lambda: list(runs.adapters()), None, names, show_progress="hidden", api_visibility="private")

    def _build_weights(self, names: Any) -> None:
        @gr.render(inputs=names, show_progress="hidden")
        def show(found: list[str]) -> None:
            with gr.Group():
                if not found:
                    gr.Markdown("No runs yet: the base model draws.", padding=True)
                sliders = {
                    name: gr.Slider(-1, 2, value=0, step=0.05, label=name, key=name, elem_id=f"weight-{name}")
                    for name in found
                }

            def draw(values: Mapping[Any, Any], progress: Any = gr.Progress()) -> dict[Any, Any]:  # noqa: B008
                return self._drawn(values, {name: values[slider] for name, slider in sliders.items()}, progress)

            inputs = {self._prompts, *self._fields.values(), *sliders.values()}
            outputs = [self._status, self._gallery, self._command]
            self._draw.click(draw, inputs, outputs, show_progress_on=self._gallery, api_visibility="private")

    def _build_inputs(self) -> None:
        config = self._suggested
        self._prompts = gr.Textbox(
            label="Prompts", placeholder="a sks toy on the left", info="One a line", lines=3, elem_id="generate-prompts"
        )
        how: dict[str, Any] = {"min_width": 140, "interactive": True}  # sliders wait for an event that comes later
        with gr.Row():
            count = gr.Slider(
                1, 16, config.num_images_per_prompt, step=1, label="Pictures", info="Of each prompt",
                elem_id="generate-count", **how,
            )  # fmt: skip
            steps = gr.Slider(
                1, 100, config.num_inference_steps, step=1, label="Steps", info="Of the sampler",
                elem_id="generate-steps", **how,
            )  # fmt: skip
        with gr.Row():
            guidance = look.number("Guidance", "1 is none; 0: the model's own", config.guidance_scale, minimum=0)
            seed = look.number(
                "Seed", "The next picture has the next", config.seed, precision=0, minimum=0, elem_id="generate-seed"
            )
        with gr.Accordion("More settings", open=False):
            negative = gr.Textbox(label="Negative prompt", info="What not to draw", lines=1)
            with gr.Row():
                scheduler = gr.Dropdown(
                    [_OWN, *SCHEDULERS],
                    value=config.scheduler_type or _OWN,
                    label="Sampler",
                    info="Of diffusers",
                    **how,
                )
                batch = look.number("Batch", "Pictures at a time", config.batch_size, precision=0, minimum=1)
        self._fields: dict[str, Any] = {
            "num_images_per_prompt": count,
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": seed,
            "negative_prompt": negative,
            "scheduler_type": scheduler,
            "batch_size": batch,
        }
        self._draw = gr.Button("Draw", variant="primary", elem_id="generate-draw")

    def _build_outputs(self) -> None:
        self._status = look.status_line("Say what to draw.", "generate-status")
        self._gallery = gr.Gallery(
            show_label=False, format="png", columns=4, object_fit="contain", interactive=False, height=480,
            elem_id="generate-pictures", buttons=["download", "download_all", "fullscreen"],
        )  # fmt: skip
        self._command = look.command_box("generate-command")

    def _drawn(self, values: Mapping[Any, Any], weights: Mapping[str, float], progress: Any) -> dict[Any, Any]:
        try:
            config = self._config(values, {name: weight for name, weight in weights.items() if weight})
            mixes = check(config)
            progress(0, desc="Getting ready")
            images = self._artist.draw(config, mixes, lambda done, total: progress((done, total), unit="steps"))
        except SVDiffError as error:
            return {self._status: look.status(error, "error")}
        wanted = wanted_pictures(config.prompt, config.num_images_per_prompt, config.seed)
        several = len(config.prompt) > 1
        captions = [f"{picture.prompt}, " * several + f"seed {picture.seed}" for picture in wanted]
        of_what = config.mix[0].replace(":", " ").replace(",", ", ") if config.mix else "the base model"
        return {
            self._status: look.status(f"{len(images)} pictures, drawn with {of_what}", "done"),
            self._gallery: list(zip(images, captions, strict=True)),
            self._command: look.in_shell(arguments("generate", config)),
        }

    def _config(self, values: Mapping[Any, Any], weights: Mapping[str, float]) -> GenerateConfig:
        there = self._runs.adapters()
        if gone := [name for name in weights if name not in there]:
            raise SVDiffError(f"there is no run {gone[0]!r} any more: look for runs")
        given = look.filled(values, self._fields)
        for field, nothing in (("guidance_scale", None), ("negative_prompt", ""), ("scheduler_type", _OWN)):
            given[field] = None if given.get(field, nothing) == nothing else given[field]
        return replace(
            self._suggested,
            **given,
            prompt=look.lines_of(values[self._prompts]),
            spectral_shifts_ckpt=[f"{name}={there[name]}" for name in weights] or None,
            mix=[",".join(f"{name}:{weight:g}" for name, weight in weights.items())] if weights else None,
        )
