"""Requests that wait together are drawn together, each with its own mixture, by one thread that owns the pipeline."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from PIL import Image

from svdiff_kernels import SVDiffError


@dataclass(frozen=True)
class Job:
    """One picture.

    Attributes:
        prompt: what to draw.
        mix: adapters and their weights.
        seed: of the noise.
        steps: of the scheduler; jobs of one batch have the same number.
        guidance_scale: of classifier-free guidance; likewise.
    """

    prompt: str
    mix: Mapping[str, float]
    seed: int
    steps: int
    guidance_scale: float

    @property
    def kind(self) -> tuple[int, float]:
        """What jobs of one batch have in common."""
        return self.steps, self.guidance_scale


@dataclass
class _Waiting:
    job: Job
    picture: asyncio.Future[Image.Image]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects jobs into batches.

    Args:
        draw: makes a picture of each job; it runs in a thread of its own, one call at a time.
        most: jobs of a batch.
        patience: seconds that the first job of a batch waits for others.
        queue: jobs that may wait; more are refused.
        thread: where to draw; made if not given.
    """

    def __init__(
        self,
        draw: Callable[[Sequence[Job]], Sequence[Image.Image]],
        *,
        most: int = 8,
        patience: float = 0.02,
        queue: int = 256,
        thread: ThreadPoolExecutor | None = None,
    ) -> None:
        self._draw, self._most, self._patience, self._queue = draw, most, patience, queue
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._thread = thread or ThreadPoolExecutor(1, "draw")
        self._sizes: deque[int] = deque(maxlen=1000)
        self._drawing = False
        self._failed = 0  # batches in a row, by more than a refusal

    @property
    def healthy(self) -> bool:
        """Whether pictures can be expected: `run` runs, and of the last three batches one did not break down."""
        return self._drawing and self._failed < 3

    @property
    def sizes(self) -> list[int]:
        """Of the latest batches."""
        return list(self._sizes)

    async def submit(self, job: Job) -> Image.Image:
        """The picture of a job, when it is drawn.

        Raises:
            SVDiffError: too many are waiting, or the job cannot be drawn.
        """
        if len(self._waiting) >= self._queue:
            raise SVDiffError(f"{self._queue} requests are waiting: come back later")
        waiting = _Waiting(job, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        self._arrived.set()
        return await waiting.picture

    async def run(self) -> None:
        """Draw what comes, until cancelled."""
        self._drawing = True
        try:
            while True:
                await self._arrived.wait()
                batch = await self._next_batch()
                if not batch:
                    continue
                self._sizes.append(len(batch))
                loop = asyncio.get_running_loop()
                try:
                    pictures = await loop.run_in_executor(self._thread, self._draw, [w.job for w in batch])
                    self._failed = 0
                except Exception as error:  # belongs to those who asked, not to the loop
                    self._failed = 0 if isinstance(error, SVDiffError) else self._failed + 1
                    for waiting in batch:
                        if not waiting.picture.done():
                            waiting.picture.set_exception(error)
                    continue
                for waiting, picture in zip(batch, pictures, strict=True):
                    if not waiting.picture.done():
                        waiting.picture.set_result(picture)
        finally:
            self._drawing = False
            self._thread.shutdown(wait=False)

    async def _next_batch(self) -> list[_Waiting]:
        """Of the kind that has waited longest, as many as there are, when they are enough or have waited enough."""
        while self._waiting and self._waiting[0].picture.done():  # its client has gone
            self._waiting.popleft()
        if not self._waiting:
            self._arrived.clear()
            return []
        first = self._waiting[0]
        while True:
            same = [w for w in self._waiting if w.job.kind == first.job.kind and not w.picture.done()][: self._most]
            left = first.since + self._patience - time.monotonic()
            if len(same) == self._most or left <= 0:
                break
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except TimeoutError:
                continue
        self._waiting = deque(w for w in self._waiting if w not in same)
        if self._waiting:
            self._arrived.set()
        return same
