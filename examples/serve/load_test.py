"""Load on the server over loopback: good requests must come out right, bad ones refused, memory stay flat.

    python examples/serve/load_test.py --output benchmarks/results/serve.jsonl

Good requests mix adapters of random shifts on the miniature; each picture is compared with one that is drawn alone, in
this process. One request in twenty is malformed or hostile. Memory may not grow by more than MOST_GROWN_MB in a run;
what allocators take once and keep, they take before the first run.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import pickle
import random
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import svdiff
import torch
from app import Artist, Settings
from batcher import Job
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save
from svdiff.checkpoint import FILE_NAMES
from tqdm.asyncio import tqdm

ADAPTERS = 12
STEPS = 10
MOST_GROWN_MB = 40
"""Of each process that draws: how much more a run may take at its highest than all before it. One process took up to
24 MB more in each of two runs of 200 requests after the first 400, and no more in 600 that followed. In a run of 2,400
for pictures of two steps it held 746 MB after the first thousand, 758 at the end."""
PROMPTS = ("a red star on the left", "a large blue circle in the center", "a small green heart on the right", "a toy")


def main() -> int:
    """The command; returns 1 if anything came out wrong."""
    parser = argparse.ArgumentParser(description="Put the server under load.")
    parser.add_argument("--requests", type=int, default=200, help="of each run")
    parser.add_argument("--warm_up", type=int, default=400, help="requests before the first run, of each replica")
    parser.add_argument("--at_once", type=int, nargs="+", default=[1, 8, 32], help="requests under way, by run")
    parser.add_argument(
        "--replicas", type=int, nargs="+", default=[1, 2], help="by server: 1 is app.py; more, so many of cluster.py"
    )
    parser.add_argument("--output", type=Path, help="also write JSON lines to this file")
    options = parser.parse_args()
    lines, wrong = [], []
    with tempfile.TemporaryDirectory() as place:
        settings = Settings("miniature", Path(place) / "adapters", most_adapters=8)
        jobs, expected = prepare(settings)
        for replicas in options.replicas:
            with server(settings, replicas) as (address, pids):
                count, most = options.warm_up * replicas, max(options.at_once)
                line, mistakes = asyncio.run(_load(address, pids, jobs, expected, count, most, settings))
                highest, wrong = line["resident_mb"], wrong + mistakes
                for at_once in (n for n in options.at_once if n >= replicas):
                    line, mistakes = asyncio.run(
                        _load(address, pids, jobs, expected, options.requests, at_once, settings)
                    )
                    line["grown_mb"] = line["resident_mb"] - highest
                    highest = max(highest, line["resident_mb"])
                    if line["grown_mb"] > MOST_GROWN_MB * len(pids):
                        mistakes.append(f"{at_once} at once: memory grew by {line['grown_mb']:.1f} MB")
                        line["wrong"] = len(mistakes)
                    lines.append(line)
                    wrong += mistakes
                    print(
                        f"{replicas} x, {at_once:3} at once: {line['pictures_per_s']:.2f} pictures/s, "
                        f"p50 {line['p50']:.2f} s, p95 {line['p95']:.2f} s, "
                        f"{line['resident_mb']:.0f} MB, grown by {line['grown_mb']:.1f}, "
                        f"{line['good']} right, {line['bad']} refused, {len(mistakes)} wrong"
                    )
    for mistake in wrong:
        print(mistake, file=sys.stderr)
    if options.output:
        options.output.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return 1 if wrong else 0


def prepare(settings: Settings) -> tuple[list[Job], list[np.ndarray]]:
    """Adapters in the folder, jobs that mix them, and what each draws alone."""
    rng, pipeline = random.Random(0), svdiff.pipelines.load_pipeline("miniature")
    adapter = svdiff.attach(pipeline, text_encoder=True)
    for i in range(ADAPTERS):
        torch.manual_seed(i)
        for group in adapter.param_groups():
            for parameter in group["params"]:
                torch.nn.init.normal_(parameter, std=0.05)
        adapter.save_weights(settings.adapters / f"adapter-{i}")
    jobs = []
    for i in range(2 * ADAPTERS):
        names = rng.sample(range(ADAPTERS), rng.choice((0, 1, 1, 2)))
        mix = {f"adapter-{n}": round(rng.uniform(0.5, 1.5), 2) for n in names}
        jobs.append(Job(rng.choice(PROMPTS), mix, i, STEPS, 2.5))
    artist = Artist(settings)
    return jobs, [np.asarray(artist.draw([job])[0]).astype(int) for job in jobs]


@contextmanager
def server(settings: Settings, replicas: int, *flags: str) -> Iterator[tuple[str, set[int]]]:
    """Its address, and the processes that draw; `flags` are more of cluster.py's."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(Path(__file__).with_name("app.py" if replicas == 1 else "cluster.py")), *flags]
    command += ["--adapters", str(settings.adapters), "--most_adapters", str(settings.most_adapters)]
    command += ["--port", str(port), "--model", settings.model]
    if replicas > 1:
        command += ["--replicas", str(replicas)]
    with tempfile.TemporaryDirectory(prefix="ray-") as place, Path(place, "log").open("w+") as log:
        own = {"RAY_TMPDIR": place, "RAY_AUTH_TOKEN": secrets.token_hex()}  # nothing of it in the home folder
        process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | own)
        address, pids = f"http://127.0.0.1:{port}", set()
        try:
            give_up = time.monotonic() + 180
            while len(pids) < replicas:
                if process.poll() is not None or time.monotonic() > give_up:
                    log.seek(0)
                    raise SystemExit(f"the server did not start:\n{log.read()}")
                try:
                    reply = httpx.get(f"{address}/health").raise_for_status()
                    pids.add(int(reply.headers.get("x-replica", f":{process.pid}").rpartition(":")[2]))
                except httpx.HTTPError:
                    time.sleep(0.2)
            yield address, pids
        finally:
            process.terminate()
            process.wait(60)


async def _load(
    address: str,
    pids: Collection[int],
    jobs: Sequence[Job],
    expected: Sequence[np.ndarray],
    requests: int,
    at_once: int,
    settings: Settings,
) -> tuple[dict[str, Any], list[str]]:
    refusals = hostile(settings)
    gate, seconds, mistakes, bad = asyncio.Semaphore(at_once), [], [], 0
    resident: list[float] = []

    async def good(client: httpx.AsyncClient, i: int) -> None:
        job = jobs[i % len(jobs)]
        body = {"prompt": job.prompt, "adapters": job.mix, "seed": job.seed}
        async with gate:
            start = time.monotonic()
            reply = await client.post(
                "/generate", json=body | {"steps": job.steps, "guidance_scale": job.guidance_scale}
            )
            seconds.append(time.monotonic() - start)
        if reply.status_code != 200:
            mistakes.append(f"{job}: {reply.status_code} {reply.text[:200]}")
            return
        drawn = np.asarray(Image.open(io.BytesIO(reply.content))).astype(int)
        if (off := np.abs(drawn - expected[i % len(jobs)]).max()) > 2:
            mistakes.append(f"{job}: another picture than alone, by {off}")

    async def refused(client: httpx.AsyncClient, i: int) -> None:
        nonlocal bad
        name, request = refusals[i % len(refusals)]
        async with gate:
            reply = await client.request(**request)
        if not 400 <= reply.status_code < 500 or not reply.json().get("detail"):
            mistakes.append(f"{name}: {reply.status_code} {reply.text[:200]}")
        else:
            bad += 1

    async def watch() -> None:
        while True:
            resident.append(_resident(pids))
            await asyncio.sleep(0.5)

    async with httpx.AsyncClient(base_url=address, timeout=600) as client:
        watching = asyncio.create_task(watch())
        start = time.monotonic()
        work = [refused(client, i // 20) if i % 20 == 19 else good(client, i) for i in range(requests)]
        await tqdm.gather(*work, desc=f"{at_once} at once", leave=False)
        wall = time.monotonic() - start
        watching.cancel()
        uploaded = (await client.get("/adapters")).json()["there"]
    if len(uploaded) != ADAPTERS:
        mistakes.append(f"the folder has {len(uploaded)} adapters, not {ADAPTERS}")
    cuts = statistics.quantiles(seconds, n=20)
    line = {
        "replicas": len(pids),
        "at_once": at_once,
        "requests": requests,
        "good": len(seconds),
        "bad": bad,
        "wrong": len(mistakes),
    }
    line |= {"pictures_per_s": len(seconds) / wall, "p50": cuts[9], "p95": cuts[18]}
    return line | {"resident_mb": max(resident) / 1e6}, mistakes


def hostile(settings: Settings) -> list[tuple[str, dict[str, Any]]]:
    """Requests that must be refused, each with what it is."""
    whole = settings.adapters / "adapter-0" / FILE_NAMES["denoiser"]
    content, tensors = whole.read_bytes(), load_file(whole)
    with safe_open(whole, framework="pt") as file:
        said = file.metadata() | {"parts": "denoiser"}
    first = min(tensors)
    nan = dict(tensors) | {first: torch.full_like(tensors[first], float("nan"))}
    hashes = said["base_hashes"].split()
    elsewhere = said | {"base_hashes": " ".join(["0" * len(hashes[0])] * len(hashes))}

    def upload(name: str, body: bytes) -> dict[str, Any]:
        return {"method": "PUT", "url": f"/adapters/{name}", "files": {"denoiser": ("x.safetensors", body)}}

    def ask(**body: Any) -> dict[str, Any]:
        return {"method": "POST", "url": "/generate", "json": {"prompt": "a toy", **body}}

    return [
        ("a pickle", upload("bad", pickle.dumps({"a": [1, 2]}))),
        ("a giant header", upload("bad", (2**40).to_bytes(8, "little") + content[8:])),
        ("a path out of the folder", upload("..%2F..%2Fbad", content)),
        ("another base", upload("bad", save(tensors, elsewhere))),
        ("NaN", upload("bad", save(nan, said))),
        ("no metadata", upload("bad", save(tensors))),
        ("a truncated file", upload("bad", content[:-100])),
        ("no prompt", {"method": "POST", "url": "/generate", "json": {"adapters": {}}}),
        ("an unknown adapter", ask(adapters={"../adapter-0": 1.0})),
        (
            "a weight that is no number",
            {"method": "POST", "url": "/generate", "content": b'{"prompt": "a", "seed": NaN}'},
        ),
        ("too many steps", ask(steps=10**9)),
    ]


def files_of(settings: Settings, name: str) -> dict[str, Path]:
    """The delta files of an adapter, by part of the pipeline."""
    files = {part: settings.adapters / name / file for part, file in FILE_NAMES.items()}
    return {part: path for part, path in files.items() if path.exists()}


def _resident(pids: Collection[int]) -> float:
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return 1024.0 * sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


if __name__ == "__main__":
    sys.exit(main())
