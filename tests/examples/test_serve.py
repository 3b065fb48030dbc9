"""The server of examples/serve: who is drawn with whom, what is right, what is refused."""

from __future__ import annotations

import asyncio
import io
import shutil
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import load_test
import numpy as np
import pytest
import torch
from app import Settings, create_app
from batcher import Batcher, Job
from fastapi.testclient import TestClient
from PIL import Image
from safetensors.torch import save
from store import AdapterStore

from svdiff_kernels import SVDiffError


def job(name: str, steps: int = 1) -> Job:
    return Job(name, {}, 0, steps, 1.0)


def run(draw: Any, jobs: Sequence[Job], **how: Any) -> tuple[list[Any], list[int]]:
    """What each of several jobs that come at once is answered, and the sizes of the batches."""

    async def main() -> tuple[list[Any], list[int]]:
        batcher = Batcher(draw, **how)
        drawing = asyncio.create_task(batcher.run())
        answers = await asyncio.gather(*map(batcher.submit, jobs), return_exceptions=True)
        drawing.cancel()
        return list(answers), batcher.sizes

    return asyncio.run(main())


def test_what_waits_together_is_drawn_together() -> None:
    answers, sizes = run(lambda jobs: [j.prompt for j in jobs], [job(str(i)) for i in range(10)], most=4)
    assert answers == [str(i) for i in range(10)]
    assert sizes == [4, 4, 2]


def test_jobs_of_another_kind_wait_for_a_batch_of_their_own() -> None:
    batches: list[list[str]] = []

    def draw(jobs: Sequence[Job]) -> list[str]:
        assert len({j.kind for j in jobs}) == 1
        batches.append([j.prompt for j in jobs])
        return batches[-1]

    answers, _ = run(draw, [job("a", 1), job("b", 2), job("c", 1), job("d", 2)])
    assert answers == ["a", "b", "c", "d"]
    assert batches == [["a", "c"], ["b", "d"]]


def test_a_batch_that_fails_fails_alone() -> None:
    def draw(jobs: Sequence[Job]) -> list[str]:
        if jobs[0].steps == 2:
            raise SVDiffError("no")
        return [j.prompt for j in jobs]

    answers, _ = run(draw, [job("a"), job("b", 2), job("c")])
    assert answers[0] == "a" and answers[2] == "c"
    assert isinstance(answers[1], SVDiffError)


def test_too_many_are_refused_at_once() -> None:
    answers, _ = run(lambda jobs: [j.prompt for j in jobs], [job(str(i)) for i in range(5)], queue=3)
    assert answers[:3] == ["0", "1", "2"]
    assert all(isinstance(answer, SVDiffError) for answer in answers[3:])


def test_the_server_is_unwell_when_three_batches_break_down_in_a_row() -> None:
    healthy: list[bool] = []

    def draw(jobs: Sequence[Job]) -> list[str]:
        if jobs[0].prompt == "breaks":
            raise RuntimeError("the device is gone")
        if jobs[0].prompt == "refused":
            raise SVDiffError("no")
        return [j.prompt for j in jobs]

    async def main() -> None:
        batcher = Batcher(cast(Any, draw), patience=0)
        assert not batcher.healthy
        drawing = asyncio.create_task(batcher.run())
        for prompt in ("breaks", "refused", "breaks", "breaks", "a", "breaks", "breaks", "breaks", "a"):
            await asyncio.gather(batcher.submit(job(prompt)), return_exceptions=True)
            healthy.append(batcher.healthy)
        drawing.cancel()
        await asyncio.gather(drawing, return_exceptions=True)
        assert not batcher.healthy

    asyncio.run(main())
    assert healthy == [True] * 7 + [False, True]


def test_who_has_gone_is_not_drawn() -> None:
    drawn: list[str] = []

    async def main() -> None:
        batcher = Batcher(lambda jobs: [drawn.append(j.prompt) or j.prompt for j in jobs], patience=0.2)
        drawing = asyncio.create_task(batcher.run())
        gone = asyncio.create_task(batcher.submit(job("gone")))
        stays = asyncio.create_task(batcher.submit(job("stays")))
        await asyncio.sleep(0.05)
        gone.cancel()
        assert await asyncio.wait_for(stays, 5) == "stays"
        drawing.cancel()

    asyncio.run(main())
    assert drawn == ["stays"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[TestClient, Settings, list[Job], list[Any]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SVDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(load_test, "STEPS", 2)
        settings = Settings("miniature", tmp_path_factory.mktemp("adapters"), most_adapters=3, batch=8)
        jobs, expected = load_test.prepare(settings)
        with TestClient(create_app(settings)) as client:
            yield client, settings, jobs, expected


def ask(client: TestClient, wanted: Job) -> np.ndarray:
    body = {"prompt": wanted.prompt, "adapters": dict(wanted.mix), "seed": wanted.seed, "steps": wanted.steps}
    reply = client.post("/generate", json=body | {"guidance_scale": wanted.guidance_scale})
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(reply.content))).astype(int)


def test_requests_at_once_are_what_each_is_alone(served: Any) -> None:
    client, _, jobs, expected = served
    drawn: dict[int, np.ndarray] = {}
    threads = [threading.Thread(target=lambda i=i: drawn.update({i: ask(client, jobs[i])})) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, picture in enumerate(expected):
        assert np.abs(drawn[i] - picture).max() <= 2, jobs[i]
    assert len({picture.tobytes() for picture in expected}) == len(jobs)
    assert max(client.app.state.batcher.sizes) > 1
    listed = client.get("/adapters").json()
    assert len(listed["there"]) == load_test.ADAPTERS and len(listed["in memory"]) <= 8


def test_what_is_malformed_or_hostile_is_refused_with_a_reason(served: Any) -> None:
    client, settings, jobs, expected = served
    before = sorted(settings.adapters.rglob("*"))
    for name, request in load_test.hostile(settings):
        reply = client.request(**request)
        assert 400 <= reply.status_code < 500, name
        assert reply.json()["detail"], name
        assert str(settings.adapters) not in reply.text
    assert sorted(settings.adapters.rglob("*")) == before
    assert np.abs(ask(client, jobs[0]) - expected[0]).max() <= 2


def test_an_uploaded_adapter_serves_and_can_be_replaced(served: Any) -> None:
    client, settings, jobs, expected = served
    names = [i for i, j in enumerate(jobs) if len(j.mix) == 1][:2]
    for i in names:
        ((source, weight),) = jobs[i].mix.items()
        files = {part: path.read_bytes() for part, path in load_test.files_of(settings, source).items()}
        reply = client.put("/adapters/new", files=files)
        assert reply.status_code == 201, reply.text
        wanted = Job(jobs[i].prompt, {"new": weight}, jobs[i].seed, jobs[i].steps, jobs[i].guidance_scale)
        assert np.abs(ask(client, wanted) - expected[i]).max() <= 2
    assert "new" in client.get("/adapters").json()["there"]


def test_a_damaged_adapter_in_the_folder_spoils_only_its_own_request(served: Any) -> None:
    client, settings, jobs, expected = served
    (settings.adapters / "torn").mkdir()
    whole = load_test.files_of(settings, "adapter-0")["denoiser"]
    (settings.adapters / "torn" / whole.name).write_bytes(whole.read_bytes()[:-100])
    replies: list[Any] = []
    body = {"prompt": "a toy", "adapters": {"torn": 1.0}, "steps": jobs[0].steps, "guidance_scale": 2.5}
    asking = threading.Thread(target=lambda: replies.append(client.post("/generate", json=body)))
    asking.start()
    assert np.abs(ask(client, jobs[0]) - expected[0]).max() <= 2
    asking.join()
    assert replies[0].status_code == 422 and "not a readable safetensors file" in replies[0].json()["detail"]
    assert str(settings.adapters) not in replies[0].text


class Fake:
    """In an adapter's stead: an adapter of it is the contents of its files."""

    def __init__(self) -> None:
        self.there: dict[str, Any] = {}

    def read_weights(self, path: Path) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in path.iterdir()}

    def load_deltas(self, deltas: dict[str, bytes], name: str, *, activate: bool) -> None:
        assert not activate
        self.there[name] = deltas

    def delete_adapters(self, name: str) -> None:
        del self.there[name]


def upload(value: float) -> dict[str, bytes]:
    content = save({"layer.delta": torch.full((5,), value)}, {"base_hashes": "0" * 16})
    return {"denoiser": content, "text_encoder": content}


def test_the_store_forgets_what_was_used_longest_ago(tmp_path: Path) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
    fake: Any = Fake()
    store = AdapterStore(fake, tmp_path, most=2)
    for name in "abac":
        store.use([name])
    assert list(fake.there) == store.loaded() == ["a", "c"]
    store.use(["d", "a", "b"])  # of one batch all are there, if they are more
    assert sorted(fake.there) == ["a", "b", "d"]
    for name in ("../a", "x", "", ".hidden", "a/b"):
        with pytest.raises(SVDiffError, match="there is no adapter"):
            store.use([name])


def test_stores_over_one_folder_see_each_others_uploads(tmp_path: Path) -> None:
    fakes: list[Any] = [Fake(), Fake()]
    stores = [AdapterStore(fake, tmp_path, most=2) for fake in fakes]
    for value, uploader in ((1.0, 0), (2.0, 1), (3.0, 1), (1.0, 0)):
        stores[uploader].add("a", upload(value))
        for fake, store in zip(fakes, stores, strict=True):
            store.check("a")
            store.use(["a"])
            assert set(fake.there["a"].values()) == set(upload(value).values())
            assert store.names() == store.loaded() == ["a"]
    held = fakes[1].there["a"]
    stores[1].use(["a"])
    assert fakes[1].there["a"] is held  # not read again
    stores[0].add("a", {"denoiser": upload(4.0)["denoiser"]})
    stores[1].use(["a"])
    assert len(fakes[1].there["a"]) == 1
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "a"}


def test_uploads_of_one_name_at_once_leave_one_whole_and_readers_never_see_less(tmp_path: Path) -> None:
    stores = [AdapterStore(cast(Any, Fake()), tmp_path, most=2) for _ in range(4)]
    stores[0].add("a", upload(0.0))
    done = threading.Event()

    def read(store: AdapterStore) -> int:
        reads = 0
        while not done.is_set():
            store.use(["a"])
            assert len(set(store._adapter.there["a"].values())) == 1 and store.names() == ["a"]  # type: ignore[attr-defined]
            reads += 1
        return reads

    with ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read, store) for store in stores[2:]]
        writers = [
            threads.submit(lambda s=s, k=k: [s.add("a", upload(float(k + i))) for i in range(50)])
            for k, s in enumerate(stores[:2])
        ]
        try:
            for writer in writers:
                writer.result(60)
        finally:
            done.set()
        assert all(reader.result(60) > 1 for reader in readers)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "a"}


def test_an_adapter_survives_the_death_of_who_replaced_it(tmp_path: Path) -> None:
    fake: Any = Fake()
    store = AdapterStore(fake, tmp_path, most=2)
    store.add("a", upload(1.0))
    (tmp_path / "a").rename(store._aside("a"))  # between the two renames
    store.use(["a"])
    assert set(fake.there["a"].values()) == set(upload(1.0).values())
    store.add("a", upload(2.0))
    store.use(["a"])
    assert set(fake.there["a"].values()) == set(upload(2.0).values())
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "a"}
    shutil.copytree(tmp_path / "a", store._aside("a"))  # after them
    store.add("a", upload(3.0))
    store.use(["a"])
    assert set(fake.there["a"].values()) == set(upload(3.0).values())
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "a"}


def test_no_adapter_takes_the_name_of_the_pipelines_own(tmp_path: Path) -> None:
    store = AdapterStore(cast(Any, Fake()), tmp_path, most=2)
    (tmp_path / "default").mkdir()
    with pytest.raises(SVDiffError, match="there is no adapter"):
        store.use(["default"])
    with pytest.raises(SVDiffError, match="not 'default'"):
        store.add("default", upload(1.0))
