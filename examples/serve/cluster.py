"""The server of app.py as a Ray Serve deployment: replicas, on one machine or many, that share a folder of adapters.

python examples/serve/cluster.py --model miniature --adapters outputs --replicas 2 --port 8000
"""

# Not `from __future__ import annotations`: `serve run` finds out by the annotation of `build` what it takes.
import argparse
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import ray
from app import Settings, create_app
from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from ray import serve

NAME = "svdiff"

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


class Cluster(BaseModel):
    """What `serve run` takes.

    Attributes:
        model: see `Settings`; as each machine knows it.
        adapters: a folder that all machines share.
        most_adapters: in memory of each replica.
        batch: pictures that a replica draws together.
        replicas: at least.
        most_replicas: at most; None for no more than at least.
        cpus: of a replica, in cores; it computes with so many threads, but at least one.
        gpus: of a replica.
    """

    model_config = ConfigDict(extra="forbid")

    model: str = "miniature"
    adapters: Path = Path("adapters")
    most_adapters: int = Field(100, ge=1)
    batch: int = Field(8, ge=1)
    replicas: int = Field(1, ge=1)
    most_replicas: int | None = None
    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)


@serve.deployment
@serve.ingress()
class Replica:
    """One process with a pipeline of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        app = create_app(self._settings)

        @app.middleware("http")
        async def signed(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
            response = await answer(request)
            response.headers["x-replica"] = f"{os.uname().nodename}:{os.getpid()}"
            return response

        return app

    def check_health(self) -> None:
        """Ray replaces a replica for which this has failed three times in a row."""
        if not self.app.state.batcher.healthy:
            raise RuntimeError("nothing can be drawn any more")


def build(cluster: Cluster) -> serve.Application:
    """The application, for `serve run`."""
    settings = Settings(cluster.model, cluster.adapters.resolve(), cluster.most_adapters, cluster.batch)
    return Replica.options(
        max_ongoing_requests=2 * cluster.batch,  # one batch is drawn, the next one waits
        max_queued_requests=256,
        autoscaling_config={
            "min_replicas": cluster.replicas,
            "max_replicas": cluster.most_replicas or cluster.replicas,
            "target_ongoing_requests": cluster.batch,
        },
        ray_actor_options={"num_cpus": cluster.cpus, "num_gpus": cluster.gpus},
    ).bind(settings)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Serve many adapters of one model by several replicas of the server.")
    parser.add_argument("--model", default="miniature", help="folder, hub id, or miniature")
    parser.add_argument("--adapters", type=Path, default=Path("adapters"), help="folder with one folder for each")
    parser.add_argument("--most_adapters", type=int, default=100, help="in memory of each replica")
    parser.add_argument("--batch", type=int, default=8, help="pictures that a replica draws together")
    parser.add_argument("--replicas", type=int, default=1, help="at least")
    parser.add_argument(
        "--most_replicas", type=int, help="at most, when requests wait; as many as --replicas if left out"
    )
    parser.add_argument("--cpus", type=float, default=1, help="cores of a replica")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of a replica; half a one is 0.5")
    parser.add_argument("--address", default="local", help="of a Ray cluster that runs; local starts one here")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    options = vars(parser.parse_args())
    http = {"host": options.pop("host"), "port": options.pop("port")}
    address = options.pop("address")
    cluster = Cluster(**options)
    here = {"working_dir": str(Path(__file__).parent)}  # other machines get these files from this one
    ray.init(address, include_dashboard=False, runtime_env=None if address == "local" else here)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    try:
        serve.start(http_options=http)
        serve.run(build(cluster), name=NAME, blocking=True)
    except KeyboardInterrupt:
        pass
    finally:
        serve.delete(NAME)
        ray.shutdown()


if __name__ == "__main__":
    main()
