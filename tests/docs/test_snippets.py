"""The Python that README.md and the guides show: it runs, on tiny models in the place of large ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import svdiff
import torch
from PIL import Image
from svdiff.evaluation import load_clip
from tiny_encoders import pattern, save_tiny_clip
from tiny_peft import tiny_llama
from tiny_pipelines import PIPELINES

ROOT = Path(__file__).parents[2]
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def shifts(pipeline: Any, *folders: str) -> None:
    """Delta files of shifts that change nothing."""
    adapter = svdiff.attach(pipeline)
    for folder in folders:
        adapter.save_weights(folder)
    adapter.unload()


def for_readme(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shifts(pipeline, "my-ink")
    patch.setattr("diffusers.StableDiffusionPipeline.from_pretrained", lambda name: pipeline)
    return {}


def for_inference(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shifts(pipeline, "outputs/dog", "outputs/ink", "outputs/cat")
    prompts = {f"prompt_{letter}": f"a {letter}" for letter in "abc"}
    return {"svdiff": svdiff, "pipe": pipeline, **prompts}


def for_stylize(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    shifts(pipeline, "my-style")
    svdiff.save_tokens("my-style", {"<style>": {"text_encoder": torch.ones(1, 12)}})
    Image.new("RGB", (16, 16), "red").save("photo.png")
    return {"pipe": pipeline}


def for_compat(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {}


def for_merging(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {}


def for_peft(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    return {"model": tiny_llama(), "base": tiny_llama()}


def for_evaluation(pipeline: Any, patch: pytest.MonkeyPatch) -> dict[str, Any]:
    patch.setattr("svdiff.evaluation.load_clip", lambda name: load_clip(str(save_tiny_clip(Path("clip")))))
    pictures = [Image.fromarray(pattern(32, i)) for i in range(12)]
    prompts = ["a dog", "a dog", "a cat", "a cat"]
    return {"our_pictures": pictures[:4], "their_pictures": pictures[4:8], "photos": pictures[8:], "prompts": prompts}


GIVEN: dict[str, Callable[[Any, pytest.MonkeyPatch], dict[str, Any]]] = {
    "README.md": for_readme,
    "docs/inference.md": for_inference,
    "docs/merging.md": for_merging,
    "docs/stylize.md": for_stylize,
    "docs/compat.md": for_compat,
    "docs/evaluation.md": for_evaluation,
    "docs/peft.md": for_peft,
}
"""What each file's snippets, run one after the other, take for granted."""


def snippets(name: str) -> list[str]:
    return SNIPPET.findall((ROOT / name).read_text())


def test_no_snippet_is_left_out() -> None:
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    names = {str(page.relative_to(ROOT)) for page in pages}
    assert {name for name in names if snippets(name)} == GIVEN.keys()


@pytest.mark.parametrize("name", GIVEN)
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline = PIPELINES["sd"](tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    names = GIVEN[name](pipeline, monkeypatch)
    for snippet in snippets(name):
        exec(compile(snippet, name, "exec"), names)
