"""The tab that edits: a picture, what it shows, what it shall show."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from svdiff_kernels import SVDiffError

from ..edit import EditConfig, check
from ..outputs import RUN_FILE
from . import look
from .child import Child, Children, arguments
from .runs import Runs

_STARTS = [("what inversion finds in it", "inversion"), ("itself, noised", "image"), ("any noise", "noise")]
_BELONGS = {"eta": ("inversion", "noise"), "slerp_alpha": ("inversion",), "strength": ("image",)}


class EditTab:
    """Components and what they do.

    Args:
        page: that it is a part of.
        runs: where edits go.
        children: starts them.
        suggested: settings for the fields at first.
    """

    def __init__(self, page: Any, runs: Runs, children: Children, suggested: EditConfig) -> None:
        self._runs, self._children, self._suggested = runs, children, suggested
        self._child: Child | None = None
        self._directory = Path()
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._build_inputs()
            with gr.Column(scale=6, min_width=320):
                self._build_outputs()
        self._timer = gr.Timer(1, active=False)
        shown = [self._status, self._start, self._stop, self._timer, self._pictures]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs = {self._image, self._prompt, self._targets, self._name, *self._fields.values()}
        self._start.click(self._begin, inputs, [*shown, self._command], **quiet)
        self._stop.click(self._end, None, shown, **quiet)
        self._timer.tick(self._look, None, shown, concurrency_limit=None, **quiet)
        page.load(self._look, None, shown, **quiet)
        start_from = self._fields["start_from"]
        of_start = [self._fields[field] for field in _BELONGS]
        start_from.change(
            lambda start: [gr.Slider(visible=start in starts) for starts in _BELONGS.values()],
            start_from, of_start, **quiet,
        )  # fmt: skip

    def _build_inputs(self) -> None:
        config = self._suggested
        how: dict[str, Any] = {"min_width": 140}
        self._image = gr.Image(
            label="The picture", type="filepath", image_mode=None, sources=["upload", "clipboard"], height=210,
            elem_id="edit-image",
        )  # fmt: skip
        self._prompt = gr.Textbox(
            label="What it shows", placeholder="a large red star in the center, white background", elem_id="edit-prompt"
        )
        self._targets = gr.Textbox(
            label="What it shall show", placeholder="a large blue star in the center, white background", lines=2,
            info="One a line", elem_id="edit-targets",
        )  # fmt: skip
        start = gr.Radio(
            _STARTS, value=config.start_from, label="Start from", elem_id="edit-start-from",
            info="Inversion keeps the structure; noise keeps only what has been learnt.",
        )  # fmt: skip
        with gr.Row():
            eta = gr.Slider(
                0, 1, config.eta, step=0.05, label="Eta", info="Noise added on the way", elem_id="edit-eta", **how
            )
            slerp_alpha = gr.Slider(
                0, 1, config.slerp_alpha, step=0.05, label="Slerp alpha", info="Turn towards fresh noise",
                elem_id="edit-slerp", **how,
            )  # fmt: skip
            strength = gr.Slider(
                0, 1, config.strength, step=0.05, label="Strength", info="0 leaves it, 1 is all noise", visible=False,
                elem_id="edit-strength", **how,
            )  # fmt: skip
        with gr.Row():
            learning = look.number("Learning steps", "On the picture", config.max_train_steps, precision=0,
                elem_id="edit-learning-steps")  # fmt: skip
            steps = look.number("Drawing steps", "Back and forth", config.num_inference_steps, precision=0,
                elem_id="edit-steps")  # fmt: skip
            self._name = gr.Textbox(
                label="Name", placeholder="edit-1, ...", info="Letters, digits, - and _", elem_id="edit-name", **how
            )
        with gr.Accordion("More settings", open=False), gr.Row():
            self._fields: dict[str, Any] = {
                "start_from": start,
                "eta": eta,
                "slerp_alpha": slerp_alpha,
                "strength": strength,
                "max_train_steps": learning,
                "num_inference_steps": steps,
                "guidance_scale": look.number("Guidance", "Towards the new words", config.guidance_scale, minimum=1),
                "num_images_per_prompt": look.number(
                    "Pictures", "Of each prompt", config.num_images_per_prompt, precision=0
                ),
                "seed": look.number("Seed", "Of all chance", config.seed, precision=0, minimum=0),
                "learning_rate": look.number("Learning rate", "Of matrices", config.learning_rate),
                "learning_rate_1d": look.number("Learning rate of norms", "Usually lower", config.learning_rate_1d),
                "train_batch_size": look.number("Batch", "Noises a step", config.train_batch_size, precision=0),
                "resolution": look.number("Resolution", "0: the model's own", config.resolution, precision=0),
            }
        with gr.Row():
            self._start = gr.Button("Edit", variant="primary", elem_id="edit-start", min_width=90)
            self._stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="edit-stop", min_width=90)

    def _build_outputs(self) -> None:
        self._status = look.status_line("Drop a picture, and say what it shows and shall show.", "edit-status")
        self._pictures = gr.Gallery(
            show_label=False, format="png", columns=3, object_fit="contain", interactive=False, visible=False,
            elem_id="edit-pictures", buttons=["download", "download_all", "fullscreen"],
        )  # fmt: skip
        self._command = look.command_box("edit-command")

    def _begin(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        name = ""
        try:
            self._children.check_idle()
            name = self._runs.free((values[self._name] or "").strip(), "edit")
            image = values[self._image]
            if not image:
                raise SVDiffError("there is no picture: drop one")
            config = self._config(values, name, image)
            check(config)
            (kept,) = self._runs.keep_pictures(name, [image]).iterdir()
            words = arguments("edit", replace(config, image=str(kept)))
            self._child = self._children.start(words, partial(self._runs.forget_pictures, name))
            self._directory = self._runs.path(name)
            return self._look() | {self._pictures: gr.Gallery(visible=False), self._command: look.in_shell(words)}
        except SVDiffError as error:
            if name:
                self._runs.forget_pictures(name)
            return {self._status: look.status(error, "error")}

    def _config(self, values: Mapping[Any, Any], name: str, image: str) -> EditConfig:
        start = values[self._fields["start_from"]]
        fields = {field: one for field, one in self._fields.items() if start in _BELONGS.get(field, (start,))}
        return replace(
            self._suggested,
            **look.filled(values, fields),
            image=image,
            prompt=values[self._prompt] or "",
            target_prompt=look.lines_of(values[self._targets]),
            output_dir=str(self._runs.path(name)),
        )

    def _end(self) -> dict[Any, Any]:
        if self._child is not None and self._child.running:
            self._child.stop()
        return self._look()

    def _look(self) -> dict[Any, Any]:
        child = self._child
        if child is None:
            return {self._timer: gr.Timer(active=False)}
        running = child.running
        updates = {
            self._start: gr.Button(interactive=not running),
            self._stop: gr.Button(interactive=running and not child.stopping),
            self._timer: gr.Timer(active=running),
        }
        if running:
            return updates | {self._status: look.status(child.status or "Starting", "busy", child.percent)}
        if child.succeeded:
            return updates | {
                self._status: look.status(f"Done: {child.status}", "done"),
                self._pictures: gr.Gallery(self._before_and_after(), visible=True),
            }
        return updates | {
            self._status: look.status(child.complaint or "Stopped", "error" if child.complaint else "idle")
        }

    def _before_and_after(self) -> list[tuple[Image.Image, str]]:
        run = json.loads((self._directory / RUN_FILE).read_text(encoding="utf-8"))
        after = [(Image.open(self._directory / told["file"]), told["prompt"]) for told in run["pictures"]]
        return [(Image.open(self._directory / "original.png"), "before"), *after]
