"""A server of many adapters: requests with different ones are drawn in one batch.

python examples/serve/app.py --model miniature --adapters outputs --port 8000
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import svdiff
import torch
from batcher import Batcher, Job
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from store import MAX_FILE_BYTES, AdapterStore
from svdiff.pipelines import device_of_choice, load_pipeline, set_scheduler

from svdiff_kernels import SVDiffError


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        model: folder, hub id, or miniature.
        adapters: folder with a sub-folder for each.
        most_adapters: in memory.
        batch: pictures drawn together.
        scheduler: of the pipeline; None for its own.
    """

    model: str
    adapters: Path
    most_adapters: int = 100
    batch: int = 8
    scheduler: str | None = "dpm++"


class Wanted(BaseModel):
    """A request for a picture."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=1000)
    adapters: dict[str, Annotated[float, Field(ge=-4, le=4, allow_inf_nan=False)]] = Field(default={}, max_length=8)
    seed: int = Field(0, ge=0, lt=2**63)
    steps: int = Field(25, ge=1, le=100)
    guidance_scale: float = Field(3.0, ge=1, le=20, allow_inf_nan=False)


class Artist:
    """The pipeline, and how it draws a batch."""

    def __init__(self, settings: Settings) -> None:
        self._pipeline = load_pipeline(settings.model)
        if settings.scheduler is not None:
            set_scheduler(self._pipeline, settings.scheduler)
        self._adapter = svdiff.attach(self._pipeline, text_encoder=True)
        self._pipeline.to(device_of_choice())
        self._pipeline.set_progress_bar_config(disable=True)
        self.store = AdapterStore(self._adapter, settings.adapters, settings.most_adapters)

    def draw(self, jobs: Sequence[Job]) -> list[Image.Image]:
        """A picture of each job, which does not depend on the others."""
        self.store.use({name for job in jobs for name in job.mix})
        with self._adapter.mixed([job.mix for job in jobs]):
            pictures = self._pipeline(
                [job.prompt for job in jobs],
                num_inference_steps=jobs[0].steps,
                guidance_scale=jobs[0].guidance_scale,
                generator=[torch.Generator().manual_seed(job.seed) for job in jobs],
            ).images
        return list(pictures)


def create_app(settings: Settings) -> FastAPI:
    """The application; the model is loaded when it starts."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # Loaded where it draws: each thread that computes in parallel has OpenMP workers of its own, and as soon as
        # there are more of these than cores, all of them sleep between two operations.
        thread = ThreadPoolExecutor(1, "draw")
        artist = await asyncio.get_running_loop().run_in_executor(thread, Artist, settings)
        app.state.store = artist.store
        app.state.batcher = Batcher(artist.draw, most=settings.batch, thread=thread)
        drawing = asyncio.create_task(app.state.batcher.run())
        yield
        drawing.cancel()

    app = FastAPI(title="svdiff", lifespan=lifespan)

    @app.post("/generate", response_class=Response)
    async def generate(wanted: Wanted) -> Response:
        with _refusals():
            for name in wanted.adapters:  # a damaged one must not spoil a batch
                await asyncio.to_thread(app.state.store.check, name)
            job = Job(wanted.prompt, wanted.adapters, wanted.seed, wanted.steps, wanted.guidance_scale)
            picture = await app.state.batcher.submit(job)
        content = io.BytesIO()
        picture.save(content, "PNG")
        return Response(content.getvalue(), media_type="image/png")

    @app.put("/adapters/{name}", status_code=201)
    async def upload(name: str, request: Request) -> dict[str, str]:
        """Delta files as a form: denoiser, text_encoder, text_encoder_2."""
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > 3 * MAX_FILE_BYTES:
            raise HTTPException(413, f"a content-length of at most {3 * MAX_FILE_BYTES} is needed")
        async with request.form(max_files=4, max_fields=0) as form:
            files = {part: await file.read() for part, file in form.items() if isinstance(file, UploadFile)}
        with _refusals():
            await asyncio.to_thread(app.state.store.add, name, files)
        return {"adapter": name}

    @app.get("/adapters")
    def adapters() -> dict[str, list[str]]:
        return {"there": app.state.store.names(), "in memory": app.state.store.loaded()}

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not app.state.batcher.healthy:
            raise HTTPException(503, "nothing can be drawn any more: restart this server")
        return {"status": "ready"}

    return app


class _refusals:
    """What our library refuses is the client's mistake, in one line."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, SVDiffError):
            raise HTTPException(422, " ".join(str(error).split())) from error


def main() -> None:
    """The command."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve many adapters of one model.")
    parser.add_argument("--model", default="miniature", help="folder, hub id, or miniature")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="folder with one folder for each")
    parser.add_argument("--most_adapters", type=int, default=100, help="in memory")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    settings = Settings(options.model, options.adapters, options.most_adapters, options.batch)
    uvicorn.run(create_app(settings), host=options.host, port=options.port)


if __name__ == "__main__":
    main()
