"""How the page looks: its theme, which loads nothing from elsewhere, and the line that says how things are."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import gradio as gr

_SYSTEM_FONT = ("ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")
_SYSTEM_MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")

CSS = """
.gradio-container { width: 100% !important; max-width: 1280px !important; margin: 0 auto !important; }
.title { border: none !important; background: none !important; box-shadow: none !important; padding: 0 !important; }
.title h1 { margin: 0; font-size: 1.5rem; }
.title p { margin: .15rem 0 0; color: var(--body-text-color-subdued); }
.line, .line > .html-container { padding: 0 !important; }
.status { border: 1px solid var(--border-color-primary); border-left: 5px solid var(--neutral-400);
  border-radius: var(--block-radius); padding: .7rem 1rem; background: var(--block-background-fill);
  overflow-wrap: anywhere; }
.status.busy { border-left-color: var(--primary-500); }
.status.done { border-left-color: #16a34a; }
.status.error { border-left-color: #dc2626; }
.status .bar { height: .45rem; margin-top: .6rem; border-radius: .3rem; overflow: hidden;
  background: var(--border-color-primary); }
.status .bar div { height: 100%; background: var(--primary-500); }
"""

Kind = Literal["idle", "busy", "done", "error"]


def theme() -> Any:
    """Fonts of the reader's system."""
    return gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", radius_size="md", font=_SYSTEM_FONT, font_mono=_SYSTEM_MONO
    ).set(
        body_background_fill="*neutral_100",
        block_shadow="0 1px 2px 0 rgb(0 0 0 / 0.05)",
        block_title_text_weight="600",
        block_info_text_size="*text_sm",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_text_color="white",
    )


def status(text: object, kind: Kind = "idle", percent: int | None = None) -> str:
    """One line, and a bar if it is known how far things are."""
    bar = "" if percent is None else f'<div class="bar"><div style="width: {percent}%"></div></div>'
    return f'<div class="status {kind}" role="status">{html.escape(" ".join(str(text).split()))}{bar}</div>'


def status_line(text: str, elem_id: str) -> Any:
    """Where a tab says how things are, see `status`."""
    return gr.HTML(status(text), elem_id=elem_id, elem_classes="line")


def number(label: str, info: str, value: float | None, **how: Any) -> Any:
    """A field for a number; gradio shows None as 0."""
    return gr.Number(value, label=label, info=info, min_width=140, interactive=True, **how)


def filled(values: Mapping[Any, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the fields by name, without the empty ones, and those whose 0 means the model's own."""
    own = {"resolution", "guidance_scale"}
    found = {name: values[component] for name, component in fields.items()}
    return {name: value for name, value in found.items() if value is not None and not (value == 0 and name in own)}


def command_box(elem_id: str) -> Any:
    """Where a tab says how to do the same in a shell, as soon as it has done something."""
    return gr.Code(
        label="The same in a shell", language="shell", lines=1, interactive=False, wrap_lines=True,
        show_line_numbers=False, buttons=["copy"], visible=False, elem_id=elem_id,
    )  # fmt: skip


def in_shell(words: Sequence[str]) -> Any:
    """A command of ours as it is typed, for `command_box`."""
    return gr.Code(shlex.join(["svdiff", *words]), visible=True)


def lines_of(text: str | None) -> list[str]:
    """What stands in the lines of a text, without the empty ones."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]
