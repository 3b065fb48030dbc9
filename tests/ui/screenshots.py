"""Writes the screenshots of docs/ui.md: ``PYTHONPATH=tests python tests/ui/screenshots.py docs/images``."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from pathlib import Path

from browser import Page, browsing, serving
from PIL import Image
from svdiff.miniature import world
from svdiff.miniature.task import Task

TASK = Task(("mushroom",))
STEPS = 200


def main(target: Path) -> None:
    """Teach the miniature its mushroom, draw it, edit a star."""
    with tempfile.TemporaryDirectory() as place:
        os.chdir(place)  # or the commands on the page would tell where this ran
        pictures = Path("pictures")
        TASK.write_pictures(pictures, "mushroom")
        captions = [TASK.prompt(scene) for scene in TASK._split("mushroom")[0]]
        scene = world.Scene((world.Item("star", "red", "center"),))
        world.render(scene).save("star.png")
        with serving(Path("outputs")) as server, browsing() as browser:
            page = Page(browser, server.address)
            train(page, sorted(pictures.glob("*.png")), captions)
            page.wait(lambda: re.match(r"Training: +[89]\d%", page.status("train")), 900)
            take(page, target / "ui-train.png")
            page.told("train", "Done", 900)
            generate(page)
            take(page, target / "ui-generate.png")
            edit(page, Path("star.png"), world.caption(scene))
            take(page, target / "ui-edit.png")


def train(page: Page, pictures: list[Path], captions: list[str]) -> None:
    page.drop("train-pictures", *pictures)
    page.fill("train-prompt", "\n".join(captions))
    page.fill(
        "train-preview", "a large sks toy on the right, white background\na small sks toy on the left, gray background"
    )
    page.fill("train-name", "mushroom")
    page.fill("train-steps", STEPS)
    page.click("train-start")


def generate(page: Page) -> None:
    page.tab("Generate")
    page.fill(
        "generate-prompts",
        "a large sks toy on the right, black background\na small sks toy on the left, white background",
    )
    page.window.locator("#weight-mushroom input[type=number]").fill("1")
    page.window.locator("#weight-mushroom input[type=number]").press("Tab")
    page.click("generate-draw")
    page.told("generate", "8 pictures", 300)


def edit(page: Page, picture: Path, caption: str) -> None:
    page.tab("Edit")
    page.drop("edit-image", picture)
    page.fill("edit-prompt", caption)
    page.fill("edit-targets", "\n".join(caption.replace("red", color) for color in ("blue", "green")))
    page.click("edit-start")
    page.told("edit", "Done", 900)


def take(page: Page, path: Path) -> None:
    """A picture of the whole page."""
    page.window.mouse.move(5, 5)
    page.window.wait_for_timeout(2500)
    image = Image.open(io.BytesIO(page.window.screenshot(full_page=True))).convert("RGB")
    image.quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(path, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
