"""The tab that trains: what to learn from, how, and how it goes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr
import pandas as pd
from PIL import Image

from svdiff_kernels import SVDiffError

from ..train import TrainConfig
from ..training.config import check
from ..training.state import checkpoints
from . import look
from .child import Child, Children, arguments
from .runs import Runs

_SMOOTHED_OVER = 10  # points


class Training:
    """A run that goes on, or has ended, as seen from outside: by the files that it writes.

    Args:
        name: of the run.
        config: its settings.
        child: the process.
    """

    def __init__(self, name: str, config: TrainConfig, child: Child) -> None:
        self.name, self.config, self.child = name, config, child
        self._directory = Path(config.output_dir)
        self._events: Any = None
        self._lock = threading.Lock()

    def losses(self) -> pd.DataFrame:
        """Those that it has logged so far, and their mean over the last few, as a table of step, loss and which."""
        folder = self._directory / self.config.logging_dir / "svdiff"
        with self._lock:
            if self._events is None and folder.is_dir():
                from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

                self._events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
            if self._events is not None:
                self._events.Reload()
            known = self._events is not None and "loss" in self._events.Tags()["scalars"]
            points = [(event.step, event.value) for event in self._events.Scalars("loss")] if known else []
        table = pd.DataFrame(points, columns=["step", "loss"])
        mean = table.assign(loss=table["loss"].rolling(_SMOOTHED_OVER, min_periods=1).mean())
        return pd.concat([table.assign(which="logged"), mean.assign(which=f"mean of {_SMOOTHED_OVER}")])

    def previews(self) -> list[Path]:
        """Grids of pictures drawn so far, the newest last."""
        return sorted((self._directory / "validation").glob("step_*.png"))

    def status(self) -> str:
        """How it goes, or how it went."""
        child = self.child
        if child.stopping:
            return look.status("Stopping: it saves a checkpoint first", "busy")
        if child.running:
            return look.status(child.status or "Starting", "busy", child.percent)
        if child.succeeded:
            return look.status(f"Done: {child.status}. See Generate.", "done")
        if child.complaint:
            return look.status(child.complaint, "error")
        if not self._directory.exists():
            return look.status("Stopped before there was anything to keep")
        saved = [path.name.removeprefix("checkpoint-") for path in checkpoints(self._directory)]
        return look.status(f"Stopped after step {saved[-1] if saved else 0}. Resume goes on from there.", "done")


class TrainTab:
    """Components and what they do.

    Args:
        page: that it is a part of.
        runs: where runs go.
        children: starts them.
        suggested: settings for the fields at first, and for what has no field.
    """

    def __init__(self, page: Any, runs: Runs, children: Children, suggested: TrainConfig) -> None:
        self._runs, self._children, self._suggested = runs, children, suggested
        self._training: Training | None = None
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._build_inputs()
            with gr.Column(scale=6, min_width=320):
                self._build_outputs()
        self._seen = gr.State()  # what this page shows of losses and previews
        self._timer = gr.Timer(1, active=False)
        shown = [self._status, self._losses, self._previews, self._start, self._stop, self._resume, self._timer]
        quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        inputs: set[Any] = {
            self._pictures,
            self._captions,
            self._class,
            self._preview,
            self._name,
            *self._fields.values(),
        }
        told = [*shown, self._seen, self._name, self._command]
        self._start.click(self._begin, inputs, told, **quiet)
        self._resume.click(self._go_on, inputs, told, **quiet)
        self._stop.click(self._end, None, shown, **quiet)
        self._timer.tick(self._look, self._seen, [*shown, self._seen], concurrency_limit=None, **quiet)
        page.load(self._look_anew, None, told, **quiet)

    def _build_inputs(self) -> None:
        config = self._suggested
        self._pictures = gr.Gallery(
            label="Pictures of one subject", type="filepath", file_types=["image"], sources=["upload", "clipboard"],
            interactive=True, columns=4, height=210, object_fit="contain", elem_id="train-pictures",
        )  # fmt: skip
        self._captions = gr.Textbox(
            label="What they show", placeholder="a sks toy", lines=2, elem_id="train-prompt",
            info="With a rare word for the subject. One line for all pictures, or a line for each, in their order.",
        )  # fmt: skip
        self._class = gr.Textbox(
            label="Its class", placeholder="a toy", lines=1, max_lines=8, elem_id="train-class",
            info="Optional. The model first draws pictures of it, lest it be forgotten. Several lines take turns.",
        )  # fmt: skip
        self._preview = gr.Textbox(
            label="Previews", placeholder="a sks toy on the left", lines=1, max_lines=4, elem_id="train-preview",
            info="Optional. Prompts, one a line, to be drawn while it trains.",
        )  # fmt: skip
        with gr.Row():
            self._name = gr.Textbox(
                label="Name", placeholder="run-1, run-2, ...", info="Letters, digits, - and _", elem_id="train-name",
                min_width=140,
            )  # fmt: skip
            steps = look.number("Steps", "In all", config.max_train_steps, precision=0, elem_id="train-steps")
        with gr.Accordion("More settings", open=False), gr.Row():
            self._fields = {
                "max_train_steps": steps,
                "learning_rate": look.number("Learning rate", "Of matrices", config.learning_rate),
                "learning_rate_1d": look.number("Learning rate of norms", "Usually lower", config.learning_rate_1d),
                "train_batch_size": look.number(
                    "Batch", "Pictures a step", config.train_batch_size, precision=0, elem_id="train-batch"
                ),
                "resolution": look.number("Resolution", "0: the model's own", config.resolution, precision=0),
                "num_class_images": look.number("Class pictures", "To be drawn", config.num_class_images, precision=0),
                "validation_steps": look.number(
                    "Preview every", "Steps", config.validation_steps, precision=0, elem_id="train-preview-every"
                ),
                "seed": look.number("Seed", "Of everything", config.seed, minimum=0, precision=0),
                "lr_scheduler": gr.Dropdown(
                    ["constant", "linear", "cosine"], value=config.lr_scheduler, label="Course of the rate",
                    info="Over the steps", min_width=140,
                ),
                "mixed_precision": gr.Dropdown(
                    ["no", "fp16", "bf16"], value=config.mixed_precision, label="Half precision",
                    info="Of the frozen model", min_width=140,
                ),
                "train_text_encoder": gr.Checkbox(
                    config.train_text_encoder, label="Train the text encoder", info="Likeness, but more memory",
                    min_width=200,
                ),
            }  # fmt: skip
        with gr.Row():
            self._start = gr.Button("Start", variant="primary", elem_id="train-start", min_width=90)
            self._stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="train-stop", min_width=90)
            self._resume = gr.Button("Resume", elem_id="train-resume", min_width=90)

    def _build_outputs(self) -> None:
        self._status = look.status_line("Drop pictures, say what they show, and start.", "train-status")
        self._losses = gr.LinePlot(
            x="step", y="loss", color="which", height=300, elem_id="train-losses",
            label=f"Loss; in dark its mean over {_SMOOTHED_OVER} points", colors_in_legend=[],
            color_map={"logged": "#a5b4fc", f"mean of {_SMOOTHED_OVER}": "#4338ca"}, visible=False,
        )  # fmt: skip
        self._previews = gr.Gallery(
            show_label=False, format="png", preview=True, object_fit="contain", height=420,
            interactive=False, elem_id="train-previews", buttons=["download", "fullscreen"], visible=False,
        )  # fmt: skip
        self._command = look.command_box("train-command")

    def _begin(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        name = ""
        try:
            self._children.check_idle()
            name = self._runs.free((values[self._name] or "").strip(), "run")
            pictures = [path for path, _ in values[self._pictures] or []]
            captions = look.lines_of(values[self._captions])
            if len(captions) > 1 and len(captions) != len(pictures):
                raise SVDiffError(f"{len(captions)} lines for {len(pictures)} pictures: one for all, or one for each")
            folder = self._runs.keep_pictures(name, pictures, captions if len(captions) > 1 else ())
            config = self._config(values, name, folder, captions[0] if captions else "")
            check(config)
            return self._run(name, config)
        except SVDiffError as error:
            if name:
                self._runs.forget_pictures(name)
            return {self._status: look.status(error, "error")}

    def _go_on(self, values: Mapping[Any, Any]) -> dict[Any, Any]:
        try:
            self._children.check_idle()
            name = (values[self._name] or "").strip()
            if not name:
                raise SVDiffError("say by its name which run to go on with")
            config = self._runs.to_resume(name)
            steps = values[self._fields["max_train_steps"]] or config.max_train_steps
            return self._run(name, replace(config, max_train_steps=steps))
        except SVDiffError as error:
            return {self._status: look.status(error, "error")}

    def _config(self, values: Mapping[Any, Any], name: str, pictures: Path, caption: str) -> TrainConfig:
        classes, previews = look.lines_of(values[self._class]), look.lines_of(values[self._preview])
        config = replace(self._suggested, **look.filled(values, self._fields))
        unused = [*([] if classes else ["prior_", "num_class"]), *([] if previews else ["validation_"])]
        idle: dict[str, Any] = {f.name: f.default for f in fields(config) if f.name.startswith(tuple(unused))}
        return replace(
            replace(config, **idle),
            output_dir=str(self._runs.path(name)),
            instance_data_dir=str(pictures),
            instance_prompt=caption,
            with_prior_preservation=bool(classes),
            class_prompt=classes or None,
            validation_prompt=previews or None,
        )

    def _run(self, name: str, config: TrainConfig) -> dict[Any, Any]:
        words = arguments("train", config)
        child = self._children.start(words, partial(self._runs.forget_pictures, name))
        self._training = Training(name, config, child)
        return self._look_anew() | {self._command: look.in_shell(words)}

    def _end(self) -> dict[Any, Any]:
        if self._training is not None and self._training.child.running:
            self._training.child.stop()
        updates = self._look(None)
        return {component: value for component, value in updates.items() if component is not self._seen}

    def _look_anew(self) -> dict[Any, Any]:
        updates = self._look(None)
        if self._training is not None:
            updates |= {self._name: self._training.name}
        return updates

    def _look(self, seen: tuple[int, int] | None) -> dict[Any, Any]:
        """What has changed since this page was told so many points and previews."""
        training = self._training
        if training is None:
            return {self._timer: gr.Timer(active=False), self._seen: None}
        running = training.child.running  # before the files are read: what it writes last is seen
        losses, previews = training.losses(), training.previews()
        now = len(losses), len(previews)
        updates = {
            self._status: training.status(),
            self._start: gr.Button(interactive=not running),
            self._stop: gr.Button(interactive=running and not training.child.stopping),
            self._resume: gr.Button(interactive=not running),
            self._timer: gr.Timer(active=running),
            self._seen: now,
        }
        if seen is None or now[0] != seen[0]:
            steps = training.config.max_train_steps
            updates[self._losses] = gr.LinePlot(losses, x_lim=[0, steps], visible=not losses.empty)
        if seen is None or now[1] != seen[1]:
            pictures = [(_opened(path), f"step {int(path.stem[5:])}") for path in previews]
            updates[self._previews] = gr.Gallery(
                pictures, selected_index=len(pictures) - 1 if pictures else None, visible=bool(pictures)
            )
        return updates


def _opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        image.load()
        return image
