"""The cluster of examples/serve: two replicas over one folder, each right, and nothing left when it stops."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any, NamedTuple

import httpx
import load_test
import numpy as np
import psutil
import pytest
from app import Settings
from batcher import Job
from PIL import Image

pytest.importorskip("ray")
pytestmark = pytest.mark.slow  # Ray and two processes with torch start


class Cluster(NamedTuple):
    running: ExitStack
    client: httpx.Client
    pids: set[int]
    processes: list[psutil.Process]
    settings: Settings
    jobs: list[Job]
    expected: list[np.ndarray]

    def ask(self, wanted: Job) -> tuple[int, np.ndarray]:
        """Who drew it, and the picture."""
        body = {"prompt": wanted.prompt, "adapters": dict(wanted.mix), "seed": wanted.seed, "steps": wanted.steps}
        reply = self.client.post("/generate", json=body | {"guidance_scale": wanted.guidance_scale})
        assert reply.status_code == 200, reply.text
        return pid_of(reply), np.asarray(Image.open(io.BytesIO(reply.content))).astype(int)

    def from_each(self, ask: Callable[[], tuple[int, Any]]) -> dict[int, Any]:
        """What each replica answered last."""
        answers: dict[int, Any] = {}
        for _ in range(100):
            pid, answer = ask()
            answers[pid] = answer
            if answers.keys() == self.pids:
                return answers
        pytest.fail(f"only {answers.keys()} answered, of {self.pids}")


def pid_of(reply: httpx.Response) -> int:
    return int(reply.headers["x-replica"].rpartition(":")[2])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with pytest.MonkeyPatch.context() as patch, ExitStack() as running:
        patch.setenv("SVDIFF_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(load_test, "STEPS", 2)
        settings = Settings("miniature", tmp_path_factory.mktemp("adapters"), most_adapters=3)
        jobs, expected = load_test.prepare(settings)
        # Where there is one core, two replicas of one core each would wait for another machine.
        address, pids = running.enter_context(load_test.server(settings, 2, "--cpus", "0.5"))
        client = running.enter_context(httpx.Client(base_url=address, timeout=60))
        top = psutil.Process(min(pids)).parents()[1]  # above Ray's own
        assert top.cmdline()[1].endswith("cluster.py")
        yield Cluster(running, client, pids, [top, *top.children(recursive=True)], settings, jobs, expected)


def test_each_replica_draws_what_is_drawn_alone(cluster: Cluster) -> None:
    with ThreadPoolExecutor(12) as at_once:
        answers = list(at_once.map(cluster.ask, cluster.jobs))
    for job, (_, picture), expected in zip(cluster.jobs, answers, cluster.expected, strict=True):
        assert np.abs(picture - expected).max() <= 2, job
    assert {pid for pid, _ in answers} == cluster.pids


def test_an_adapter_uploaded_to_one_replica_serves_from_both_and_so_does_its_successor(cluster: Cluster) -> None:
    singles = [i for i, job in enumerate(cluster.jobs) if len(job.mix) == 1]
    for i in (*singles[:2], singles[0]):
        ((source, weight),) = cluster.jobs[i].mix.items()
        files = {part: path.read_bytes() for part, path in load_test.files_of(cluster.settings, source).items()}
        reply = cluster.client.put("/adapters/new", files=files)
        assert reply.status_code == 201, reply.text
        job = cluster.jobs[i]
        wanted = Job(job.prompt, {"new": weight}, job.seed, job.steps, job.guidance_scale)
        for picture in cluster.from_each(lambda wanted=wanted: cluster.ask(wanted)).values():
            assert np.abs(picture - cluster.expected[i]).max() <= 2


def test_each_replica_lists_the_folder_and_forgets_on_its_own(cluster: Cluster) -> None:
    def listed() -> tuple[int, dict[str, list[str]]]:
        reply = cluster.client.get("/adapters")
        return pid_of(reply), reply.json()

    for answer in cluster.from_each(listed).values():
        assert set(answer["there"]) >= {f"adapter-{i}" for i in range(load_test.ADAPTERS)}
        assert len(answer["in memory"]) <= 8


def test_what_is_malformed_or_hostile_is_refused_with_a_reason(cluster: Cluster) -> None:
    before = sorted(cluster.settings.adapters.rglob("*"))
    for name, request in load_test.hostile(cluster.settings):
        reply = cluster.client.request(**request)
        assert 400 <= reply.status_code < 500, name
        assert reply.json()["detail"], name
        assert str(cluster.settings.adapters) not in reply.text
    assert sorted(cluster.settings.adapters.rglob("*")) == before


def test_nothing_is_left_when_it_stops(cluster: Cluster) -> None:
    assert {process.pid for process in cluster.processes} > cluster.pids
    cluster.running.close()
    _, alive = psutil.wait_procs(cluster.processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
