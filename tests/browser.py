"""`svdiff ui` in a process of its own, and a browser without a window to use it by."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_ARGUMENTS = """
--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class Server:
    """Where the page is, and where its runs go."""

    address: str
    runs: Path
    process: subprocess.Popen[str]


@contextmanager
def serving(runs: Path, environment: dict[str, str] | None = None) -> Iterator[Server]:
    """A server until the end of the block, and not a process longer."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "svdiff", "ui", "--port", str(port), "--output_dir", str(runs)]
    process = subprocess.Popen(command, env=environment or dict(os.environ), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert f"http://127.0.0.1:{port}" in line, line
        yield Server(f"http://127.0.0.1:{port}", runs, process)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


@contextmanager
def browsing() -> Iterator[Any]:
    """A browser of Playwright's."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=_ARGUMENTS)
        yield browser
        browser.close()


class Page:
    """The page in a window, by what people do with it.

    Args:
        browser: see `browsing`.
        address: of the server.
        width: of the window.
        scale: pixels of the screen to one of the window.
    """

    def __init__(self, browser: Any, address: str, width: int = 1280, scale: float = 1) -> None:
        self.requests: list[str] = []
        self.window = browser.new_page(viewport={"width": width, "height": 900}, device_scale_factor=scale)
        self.window.on("request", lambda request: self.requests.append(request.url))
        self.window.goto(address)
        self.window.wait_for_selector("#train-start", timeout=60_000)

    def tab(self, name: str) -> None:
        self.window.get_by_role("tab", name=name).click()

    def click(self, place: str) -> None:
        self.window.locator(f"#{place}").click()

    def fill(self, place: str, text: object) -> None:
        field = self.window.locator(f"#{place} textarea, #{place} input").first
        field.fill(str(text))
        field.press("Tab")

    def drop(self, place: str, *pictures: Path) -> None:
        """Give pictures to a field, and wait until the server has them."""
        self.window.locator(f"#{place} input[type=file]").set_input_files([str(path) for path in pictures])
        shown = self.window.locator(f"#{place} img")
        self.wait(lambda: shown.count() >= len(pictures), 30)

    def status(self, tab: str) -> str:
        return str(self.window.locator(f"#{tab}-status .status").inner_text())

    def told(self, tab: str, text: str, seconds: float = 120) -> str:
        """What the status line says when it says this."""
        self.wait(lambda: text in self.status(tab), seconds, lambda: self.status(tab))
        return self.status(tab)

    def wait(self, condition: Any, seconds: float, why: Any = lambda: "") -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, why()
            self.window.wait_for_timeout(100)

    def pictures(self, place: str) -> list[bytes]:
        """Files that a gallery shows, in order."""
        found = self.window.locator(f"#{place} .grid-container img").all()
        return [self.window.request.get(image.get_attribute("src")).body() for image in found]
