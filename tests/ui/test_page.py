"""The page as people use it: in a browser, against a server in a process of its own."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import svdiff
from browser import CHROMIUM, Page, Server, browsing, serving
from PIL import Image
from processes import environment
from svdiff.miniature import load_pipeline, world
from svdiff.miniature.evaluate import GUIDANCE
from svdiff.pipelines import set_scheduler
from svdiff.sampling import sample

STEPS = 3  # of the sampler
PROMPT = "a sks toy on the left"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("ui")
    with serving(place / "runs", environment() | {"SVDIFF_CACHE": str(place / "cache")}) as server:
        yield server
    assert server.process.returncode == 143


@pytest.fixture(scope="module")
def page(server: Server) -> Iterator[Page]:
    pytest.importorskip("playwright")
    if CHROMIUM is None:
        told = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        told("there is no Chromium: apt-get install chromium")
    with browsing() as browser:
        page = Page(browser, server.address)
        yield page
        assert not [url for url in page.requests if not url.startswith((server.address, "data:", "blob:"))]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    for i, scene in enumerate(world.subject_scenes("mushroom")[:3]):
        world.render(scene).save(folder / f"photo {i}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def trained(page: Page, server: Server, pictures: list[Path]) -> Path:
    """A run of a few steps; while it goes on the page shows its losses and previews."""
    page.drop("train-pictures", *pictures)
    page.fill("train-prompt", "a sks toy")
    page.fill("train-preview", PROMPT)
    page.fill("train-name", "dog")
    page.fill("train-steps", 22)
    page.window.get_by_role("button", name="More settings").first.click()
    page.fill("train-batch", 8)  # or a busy browser would not see it train
    page.fill("train-preview-every", 11)
    page.click("train-start")
    page.told("train", "Training")
    shown = page.window.locator("#train-previews img")
    page.wait(lambda: shown.count() > 0, 60, lambda: page.status("train"))
    assert "Done" not in page.status("train")
    assert min(losses_shown(page)) >= 2  # as logged, and their mean
    assert "Done: 19,592 numbers" in page.told("train", "Done")
    return server.runs / "dog"


def losses_shown(page: Page) -> list[int]:
    """How many points each line of the plot has."""
    lines = page.window.locator("#train-losses .mark-line path").all()
    return [len(re.findall("[ML]", line.get_attribute("d") or "")) for line in lines]


def test_training_shows_how_it_goes(page: Page, server: Server, trained: Path, pictures: list[Path]) -> None:
    run = json.loads((trained / "run.json").read_text())
    assert (run["steps"], run["config"]["train_batch_size"]) == (22, 8)
    kept = sorted((server.runs / ".pictures" / "dog").iterdir())
    assert [path.name for path in kept] == ["000-photo-0.png", "001-photo-1.png", "002-photo-2.png"]
    assert [path.read_bytes() for path in kept] == [path.read_bytes() for path in pictures]
    page.wait(lambda: losses_shown(page) == [4, 4], 10)  # of steps 1, 10, 20 and 22
    page.wait(lambda: page.window.locator("#train-previews .thumbnail-small").count() == 2, 10)
    again = Page(page.window.context.browser, server.address)  # who comes later sees the same
    assert again.told("train", "Done") == page.status("train")
    again.wait(lambda: losses_shown(again) == [4, 4], 10)
    again.window.close()


def test_a_run_is_drawn_by_its_slider(
    page: Page, server: Server, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.tab("Generate")
    page.fill("generate-prompts", f"{PROMPT}\na red star on the right")
    for place, value in (("generate-count", 1), ("generate-steps", STEPS), ("generate-seed", 5)):
        fill_slider(page, place, value)

    def draw(weight: float) -> list[np.ndarray]:
        fill_slider(page, "weight-dog", weight)
        page.click("generate-draw")
        page.told("generate", f"drawn with dog {weight:g}" if weight else "drawn with the base model")
        page.wait(lambda: len(page.pictures("generate-pictures")) == 2, 10)
        page.window.wait_for_timeout(500)
        return [np.asarray(Image.open(io.BytesIO(one))).astype(int) for one in page.pictures("generate-pictures")]

    base, some, all_of_it = draw(0), draw(0.5), draw(1)
    assert np.abs(some[0] - base[0]).max() > 2
    assert np.abs(all_of_it[0] - some[0]).max() > 2
    command = page.window.locator("#generate-command .cm-content").inner_text()
    assert f"--spectral_shifts_ckpt dog={trained} --mix dog:1" in " ".join(command.split())

    monkeypatch.setenv("SVDIFF_CACHE", str(server.runs.parent / "cache"))
    pipeline = load_pipeline()
    set_scheduler(pipeline, "dpm++")
    adapter = svdiff.load(pipeline, trained)
    for weight, shown in ((0.0, base), (0.5, some), (1.0, all_of_it)):
        adapter.set_adapters("default", weight)
        how: dict[str, Any] = {"batch_size": 4, "num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        drawn = sample(pipeline, [PROMPT, "a red star on the right"], [5, 6], resolution=(64, 64), **how)
        for ours, theirs in zip(drawn, shown, strict=True):
            assert np.abs(np.asarray(ours).astype(int) - theirs).max() <= 1


def fill_slider(page: Page, place: str, value: float) -> None:
    page.window.locator(f"#{place} input[type=number]").fill(str(value))
    page.window.locator(f"#{place} input[type=number]").press("Tab")


@pytest.mark.usefixtures("trained")
def test_a_stopped_run_goes_on(page: Page, server: Server) -> None:
    page.tab("Train")
    page.fill("train-name", "cat")
    page.fill("train-preview", "")
    page.fill("train-steps", 500)
    page.click("train-start")
    page.told("train", "Training")
    page.click("train-stop")
    stopped = re.search(r"Stopped after step (\d+)", page.told("train", "Stopped after"))
    assert stopped is not None
    assert (server.runs / "cat" / f"checkpoint-{stopped[1]}").is_dir()
    page.tab("Generate")
    page.window.locator("#weight-cat").wait_for()  # as far as it has come
    page.tab("Train")
    page.fill("train-steps", int(stopped[1]) + 2)
    page.click("train-resume")
    assert f"after {int(stopped[1]) + 2} steps" in page.told("train", "Done")
    assert (server.runs / "cat" / "spectral_shifts.safetensors").is_file()


def test_a_picture_is_edited(page: Page, server: Server, tmp_path: Path) -> None:
    scene = world.Scene((world.Item("star", "red", "center"),))
    world.render(scene).save(tmp_path / "star.png")
    page.tab("Edit")
    page.drop("edit-image", tmp_path / "star.png")
    page.fill("edit-prompt", world.caption(scene))
    page.fill("edit-targets", "a large blue star in the center\na large red heart in the center")
    page.fill("edit-learning-steps", 3)
    page.fill("edit-steps", 2)
    fill_slider(page, "edit-slerp", 0.25)
    page.click("edit-start")
    assert "Done: 2 pictures" in page.told("edit", "Done")
    run = json.loads((server.runs / "edit-1" / "run.json").read_text())
    assert (run["config"]["slerp_alpha"], run["config"]["max_train_steps"]) == (0.25, 3)
    files = ["original.png", *(told["file"] for told in run["pictures"])]
    page.wait(lambda: len(page.pictures("edit-pictures")) == 3, 10)
    for shown, file in zip(page.pictures("edit-pictures"), files, strict=True):
        assert np.array_equal(Image.open(io.BytesIO(shown)), Image.open(server.runs / "edit-1" / file))


@pytest.mark.usefixtures("trained")
def test_mistakes_are_one_line(page: Page, server: Server) -> None:
    before = sorted(server.runs.rglob("*"))
    page.tab("Train")
    for name, prompt, message in (
        ("dog", "a sks toy", "there is a run called 'dog' already"),
        ("../dog", "a sks toy", "'../dog' is no name of a run"),
        ("new", "", "instance_prompt is empty"),
        ("new", "one\ntwo", "2 lines for 3 pictures"),
    ):
        page.fill("train-name", name)
        page.fill("train-prompt", prompt)
        page.click("train-start")
        assert "\n" not in page.told("train", message, 20)
    page.fill("train-name", "nobody")
    page.click("train-resume")
    page.told("train", "there is no run called 'nobody' to go on with", 20)
    page.tab("Generate")
    page.fill("generate-prompts", " ")
    page.click("generate-draw")
    page.told("generate", "a prompt is empty", 20)
    page.tab("Edit")
    page.fill("edit-targets", "")
    page.click("edit-start")
    page.told("edit", "a prompt is empty", 20)
    assert sorted(server.runs.rglob("*")) == before


@pytest.mark.usefixtures("trained")
def test_no_file_but_the_pages_own_is_served_or_taken(page: Page, server: Server, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(b"secret")
    for path in (tmp_path / "secret.png", server.runs / "dog" / "run.json", Path(svdiff.__file__)):
        assert httpx.get(f"{server.address}/gradio_api/file={path}").status_code == 403
    sent = []
    page.window.route("**/queue/join*", lambda route: (sent.append(route.request.post_data_json), route.continue_()))
    page.tab("Train")
    page.fill("train-name", "thief")
    page.fill("train-prompt", "a sks toy")
    page.fill("train-steps", 0)  # or this one would train
    page.click("train-start")
    page.told("train", "max_train_steps must be at least 1", 20)
    (join,) = [join for join in sent if "secret" not in str(join) and ".png" in str(join["data"])]
    for item in next(value for value in join["data"] if isinstance(value, list) and ".png" in str(value)):
        item["image"]["path"] = str(tmp_path / "secret.png")
    session = {"session_hash": "thief"}
    assert httpx.post(f"{server.address}/gradio_api/queue/join", json=join | session).status_code == 200
    with httpx.stream("GET", f"{server.address}/gradio_api/queue/data", params=session, timeout=20) as answer:
        said = next(line for line in answer.iter_lines() if "process_completed" in line)
    assert not json.loads(said.removeprefix("data:"))["success"]
    assert not (server.runs / ".pictures" / "thief").exists()
