"""Training by several processes: the same outcome as by one, and one end for all.

A process that has imported everything and computed nothing, and so can be forked, starts them: the commands of a
launcher, without its seconds.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import svdiff
import torch
import torch.distributed as dist
from PIL import Image
from processes import exit_code
from safetensors.torch import load_file, save_file
from svdiff import cli
from tiny_encoders import save_tiny_clip
from torch import Tensor

import svdiff_kernels
from svdiff_kernels import SVDiffError

# Taken before processes are forked: what all of them would import by themselves, for seconds.
IMPORTED = {
    "accelerate": ["Accelerator"],
    "diffusers": ["StableDiffusionPipeline", "UNet2DConditionModel", "AutoencoderKL", "DDIMScheduler", "DDPMScheduler"],
    "diffusers.optimization": ["get_scheduler"],
    "peft": ["LoraConfig"],
    "svdiff.train": ["train"],
    "torch.distributed.fsdp": ["fully_shard"],
    "torch.utils.tensorboard": ["SummaryWriter"],
    "transformers": ["CLIPTextModel", "CLIPTokenizer", "HfArgumentParser"],
}

Scenario = Callable[[Path], object]
SCENARIOS: dict[str, Scenario] = {}


def scenario(prepare: Scenario) -> Scenario:
    """Something that each process does before the command; it gets a folder for what it wants to tell."""
    SCENARIOS[prepare.__name__] = prepare
    return prepare


class Team:
    """Runs ``svdiff train`` in several processes."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder, self._settings, self._count = folder, settings, 0
        paths = [Path(svdiff.__file__).parents[1], Path(svdiff_kernels.__file__).parents[1], Path(__file__).parents[2]]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"}
        self.env = env | {"SVDIFF_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, __file__], env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def arguments(self, output_dir: Path, **settings: Any) -> list[str]:
        found = ["train"]
        for name, value in (self._settings | {"output_dir": output_dir} | settings).items():
            found += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return found

    def start(self, processes: int, prepare: Scenario | None = None, **settings: Any) -> Run:
        self._count += 1
        folder = self._folder / f"{self._count}"
        folder.mkdir()
        settings.setdefault("output_dir", folder / "run")
        # As under torchrun: the store is the launcher's, and outlives each process.
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
        job = {
            "arguments": self.arguments(**settings),
            "processes": processes,
            "port": store.port,
            "prepare": prepare and prepare.__name__,
            "folder": str(folder),
        }
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return Run(folder, Path(settings["output_dir"]), self._answer(), self._answer, store)

    def run(self, processes: int, prepare: Scenario | None = None, **settings: Any) -> Run:
        run = self.start(processes, prepare, **settings)
        codes = run.wait()
        assert codes == [0] * processes, run.errors()
        return run

    def close(self) -> None:
        self._server.communicate()

    def _answer(self) -> list[int]:
        line = self._server.stdout.readline()
        assert line, "the process that starts the others has ended"
        return json.loads(line)


class Run:
    """What became of a command."""

    def __init__(
        self, folder: Path, output: Path, pids: list[int], answer: Callable[[], list[int]], store: dist.TCPStore
    ) -> None:
        self.folder, self.output, self.pids, self._answer, self._store = folder, output, pids, answer, store

    def wait(self) -> list[int]:
        """How each process ended."""
        return self._answer()

    def errors(self) -> list[str]:
        return [(self.folder / f"stderr.{rank}").read_text() for rank in range(len(self.pids))]

    def said(self) -> list[str]:
        return [(self.folder / f"stdout.{rank}").read_text() for rank in range(len(self.pids))]

    def told(self, name: str) -> list[Any]:
        return [json.loads((self.folder / f"{name}.{rank}").read_text()) for rank in range(len(self.pids))]

    def learnt(self) -> dict[str, Tensor]:
        """Of every file, without its metadata."""
        files = sorted(self.output.glob("*.safetensors"))
        return {f"{file.name} {key}": tensor for file in files for key, tensor in load_file(file).items()}

    def says_once(self, message: str) -> None:
        """Fail unless all processes have ended for a mistake that just one of them has told, in one line."""
        assert self.wait() == [2] * len(self.pids), self.errors()
        assert message in "".join(self.errors()) and "".join(self.errors()).count("\n") == 1, self.errors()


def assert_same(one: Run, other: Run, *, atol: float = 1e-5) -> None:
    first, second = one.learnt(), other.learnt()
    assert first.keys() == second.keys() and first
    for key, tensor in first.items():
        torch.testing.assert_close(second[key], tensor, rtol=0, atol=atol, msg=lambda text, key=key: f"{key}: {text}")
    assert max(tensor.abs().max() for tensor in first.values()) > 1e-3  # something has been learnt


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory, base: Path, pictures: Path) -> Iterator[Team]:
    settings = {
        "pretrained_model_name_or_path": base,
        "instance_data_dir": pictures,
        "instance_prompt": "a sks dog",
        "max_train_steps": 3,
        # Larger than the noise of sums: or a gradient that is but noise would move a shift by a whole step.
        "adam_epsilon": 1e-4,
        "report_to": "none",
        "prior_generation_num_inference_steps": 2,
        "validation_num_inference_steps": 2,
    }
    team = Team(tmp_path_factory.mktemp("team"), settings)
    yield team
    team.close()


PRIOR = {"with_prior_preservation": True, "class_prompt": ["a dog", "a cat"], "num_class_images": 3}


@scenario
def penultimate(folder: Path) -> None:
    """As SDXL, take what the text encoder's last layer gets, so that nothing in that layer has a gradient."""
    from svdiff.training.families import StableDiffusion

    def encode(self: Any, encoder: str, ids: Tensor) -> tuple[Tensor, ...]:
        return (self.text_encoders[encoder](ids, output_hidden_states=True).hidden_states[-2],)

    StableDiffusion.encode = encode


Split = tuple[int, int, int]
"""Processes, pictures of a batch in each, and batches of a step."""


@pytest.mark.parametrize(
    ("settings", "splits", "prepare"),
    [
        ({**PRIOR, "random_flip": True}, [(1, 2, 2), (2, 2, 1)], None),
        ({"train_text_encoder": True, "use_ema": True, "ema_decay": 0.5, "center_crop": True}, [(2, 1, 2)], None),
        ({"method": "lora", "train_text_encoder": True, "learning_rate": 1e-2}, [(4, 1, 1)], penultimate),
    ],
    ids=["prior", "text encoder and EMA", "lora"],
)
def test_the_same_pictures_a_step_teach_the_same(
    team: Team, settings: dict[str, Any], splits: list[Split], prepare: Scenario | None
) -> None:
    alone = team.run(1, prepare, train_batch_size=4, **settings)
    if "class_prompt" in settings:
        settings = settings | {"class_data_dir": alone.output / "class_images"}
    for processes, size, batches in splits:
        shared = team.run(processes, prepare, train_batch_size=size, gradient_accumulation_steps=batches, **settings)
        assert_same(alone, shared)


def test_an_inversion_network_learns_the_same(team: Team, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"modifier_token": "sks", "initializer_token": "d", "inversion_dropout": 0}
    settings["image_encoder"] = save_tiny_clip(tmp_path)
    assert_same(team.run(1, train_batch_size=4, **settings), team.run(2, train_batch_size=2, **settings))


@scenario
def counting(folder: Path) -> None:
    """Note what this process draws and encodes, and what latents it knows when it begins."""
    from svdiff.training import prior, validation
    from svdiff.training.dreambooth import DreamBooth
    from svdiff.training.sources import Latents

    rank, counts = os.environ.get("RANK", "0"), dict.fromkeys(("classes", "encoded", "validation"), 0)
    encode, prepare = Latents._encode, DreamBooth.prepare

    def tell() -> None:
        (folder / f"counts.{rank}").write_text(json.dumps(counts))

    def counted(name: str, sample: Any) -> Any:
        def drawing(pipeline: Any, prompts: Any, *rest: Any, **how: Any) -> Any:
            counts[name] += len(prompts)
            tell()
            return sample(pipeline, prompts, *rest, **how)

        return drawing

    def encoding(self: Latents, cuts: Any) -> Any:
        counts["encoded"] += len(cuts)
        return encode(self, cuts)

    def preparing(self: DreamBooth) -> None:
        prepare(self)
        tell()
        known = self._latents._known
        tensors = {f"{piece} {name}": t for piece, row in known.items() for name, t in row._asdict().items()}
        save_file(tensors, folder / f"latents.{rank}")

    prior.sample, validation.sample = counted("classes", prior.sample), counted("validation", validation.sample)
    Latents._encode, DreamBooth.prepare = encoding, preparing


def test_work_is_shared(team: Team) -> None:
    """Class pictures, latents and validation; and the first process alone writes and speaks."""
    settings = {
        **PRIOR, "num_class_images": 5, "random_flip": True, "center_crop": True, "sample_batch_size": 1,
        "validation_prompt": ["a dog", "a sks dog", "a cat"], "num_validation_images": 1, "report_to": "tensorboard",
        "max_train_steps": 1,
    }  # fmt: skip
    alone, shared = (team.run(n, counting, train_batch_size=2 // n, **settings) for n in (1, 2))
    assert_same_files(alone.output, shared.output)
    assert alone.told("counts") == [{"classes": 5, "encoded": 4, "validation": 3}]  # in the one step that it takes
    first, second = shared.told("counts")
    assert first == {"classes": 3, "encoded": 8, "validation": 2}
    assert second == {"classes": 2, "encoded": 8, "validation": 2}
    one, other = (load_file(shared.folder / f"latents.{rank}") for rank in range(2))
    assert one.keys() == other.keys() and len(one) == 16 * 4
    assert all(torch.equal(other[key], tensor) for key, tensor in one.items())
    assert_same_pictures(alone, shared)
    said = shared.said()
    assert "numbers (" in said[0] and said[1] == ""


def test_real_pictures_and_sizes_are_the_same_for_all(team: Team, tmp_path: Path) -> None:
    """Captions are compared in parallel; what is chosen, and how large it is drawn, does not depend on that."""
    for i, caption in enumerate(["a dog", "dog", "a cat and a dog", "a cat", "a tree", "a dog", "dogs"]):
        Image.new("RGB", (16, 16), (30 * i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    settings = {
        **PRIOR, "real_prior": True, "real_prior_dir": tmp_path, "real_prior_min_similarity": -1,
        "size_augmentation": True, "random_flip": True,
    }  # fmt: skip
    alone, shared = (team.run(n, train_batch_size=4 // n, **settings) for n in (1, 2))
    assert_same(alone, shared)
    assert_same_files(alone.output, shared.output)
    one, other = ((run.output / "real_prior.json").read_text() for run in (alone, shared))
    assert one == other and [entry["caption"] for entry in json.loads(one)["classes"][0]["chosen"]][:1] == ["a dog"]
    assert "chose 3 of 7 real pictures" in shared.said()[0] and shared.said()[1] == ""


def assert_same_pictures(one: Run, other: Run, *, atol: int = 1) -> None:
    pictures = [path.relative_to(one.output) for path in one.output.rglob("*.png")]
    assert pictures
    for path in pictures:
        first, second = (np.asarray(Image.open(run.output / path)).astype(int) for run in (one, other))
        assert np.abs(first - second).max() <= atol, path


def assert_same_files(one: Path, other: Path) -> None:
    def names(folder: Path) -> list[str]:
        paths = (str(path.relative_to(folder)) for path in folder.rglob("*"))
        return sorted(re.sub(r"\d{6}.*", "<time>", path) if path.startswith("logs") else path for path in paths)

    assert names(one) == names(other)


def test_another_number_of_processes_goes_on_with_a_run(team: Team) -> None:
    straight = team.run(1, train_batch_size=4, max_train_steps=5, use_ema=True)
    begun = team.run(2, train_batch_size=2, max_train_steps=3, use_ema=True, checkpointing_steps=2)
    for processes in (4, 1):
        run = team.run(
            processes, train_batch_size=4 // processes, max_train_steps=5, use_ema=True, output_dir=begun.output,
            resume_from_checkpoint="checkpoint-2",
        )  # fmt: skip
        assert_same(straight, run)
        assert "going on from checkpoint-2" in run.said()[0] and not "".join(run.said()[1:])


@pytest.mark.parametrize("told", [[1], [0, 1]], ids=["one", "all"])
def test_told_to_end_all_stop_at_one_step(team: Team, told: list[int]) -> None:
    settings = {"max_train_steps": 100_000, "checkpointing_steps": 4, "checkpoints_total_limit": 1}
    run = team.start(2, **settings)
    wait_for(lambda: list(run.output.glob("checkpoint-*")))
    for rank in told:
        os.kill(run.pids[rank], signal.SIGTERM)
    assert run.wait() == [143, 143], run.errors()
    assert run.errors() == ["", ""]
    (checkpoint,) = run.output.glob("checkpoint-*")
    step = int(checkpoint.name.split("-")[1])
    again = team.run(
        2, **settings | {"max_train_steps": step + 1}, output_dir=run.output, resume_from_checkpoint="latest"
    )
    assert f"after {step + 1} steps" in again.said()[0]


def wait_for(something: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not something():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"no_such_flag": 1}, "--no_such_flag"),
        ({"instance_data_dir": "/nowhere"}, "no picture folder"),
        ({"targets": "no_such"}, "no_such"),
        ({"learning_rate": 1e30, "max_grad_norm": 0}, "the loss became"),
    ],
)
def test_a_mistake_is_told_once(team: Team, settings: dict[str, Any], message: str) -> None:
    run = team.start(2, **settings)
    run.says_once(message)
    assert not run.output.exists()


def test_what_only_the_first_process_sees_ends_all(team: Team) -> None:
    earlier = team.run(1, max_train_steps=1)
    team.start(2, output_dir=earlier.output).says_once("already holds a run")


@scenario
def one_fails(folder: Path) -> None:
    """The second process, in its second step."""

    def fail() -> None:
        raise SVDiffError("the second has failed")

    in_the_second_step(fail)


@scenario
def one_is_killed(folder: Path) -> None:
    in_the_second_step(lambda: os.kill(os.getpid(), signal.SIGKILL))


@scenario
def one_cannot_write(folder: Path) -> None:
    """The first, its checkpoint."""
    from svdiff.training import state

    def save(*rest: Any, **how: Any) -> None:
        raise SVDiffError("cannot write checkpoint-2: No space left on device")

    state.save = save


def in_the_second_step(work: Callable[[], object]) -> None:
    from svdiff.training.dreambooth import DreamBooth

    draw = DreamBooth.draw

    def drawing(self: DreamBooth, batch: int) -> Any:
        if batch == 1 and os.environ["RANK"] == "1":
            work()
        return draw(self, batch)

    DreamBooth.draw = drawing


@pytest.mark.parametrize(
    ("prepare", "message"), [(one_fails, "the second has failed"), (one_cannot_write, "No space left on device")]
)
def test_where_one_process_fails_all_end(team: Team, prepare: Scenario, message: str) -> None:
    run = team.start(3, prepare, checkpointing_steps=2)
    run.says_once(message)
    assert not run.output.exists()


def test_where_one_process_is_killed_the_others_say_so(team: Team) -> None:
    run = team.start(3, one_is_killed)
    assert run.wait() == [2, -signal.SIGKILL, 2]
    assert [error for error in run.errors() if error] == [
        "svdiff: error: another process of this run has ended without a word: killed, or out of memory?\n"
    ]
    assert not run.output.exists()


@scenario
def different_folders(folder: Path) -> None:
    """As on two machines without a common disk."""
    os.chdir(folder)
    Path(os.environ["RANK"]).mkdir()
    os.chdir(os.environ["RANK"])


def test_machines_must_share_class_pictures(team: Team) -> None:
    run = team.start(2, different_folders, **PRIOR, class_data_dir="class", output_dir="run")
    run.says_once("not all processes see the same pictures")


@scenario
def weighing(folder: Path) -> None:
    """Note how many bytes of frozen weights this process holds: of whole models, and of its parts of them."""
    module = importlib.import_module("svdiff.train")  # svdiff.train is the function
    shard = module.shard_frozen

    def sharding(model: Any, device: torch.device) -> None:
        factors = [t for name, t in model.named_buffers() if name.endswith((".U", ".Vh", ".base"))]
        assert all(t.is_meta for name, t in model.named_buffers() if name.endswith(".U"))  # none has been loaded yet
        whole = sum(t.nbytes for t in (*factors, *frozen(model)))
        shard(model, device)
        parts = sum(parameter.to_local().nbytes for parameter in frozen(model))
        rest = sum(t.nbytes for t in model.buffers() if t.dim() > 1)
        (folder / f"bytes.{os.environ['RANK']}").write_text(json.dumps([whole, parts + rest]))

    def frozen(model: Any) -> list[Any]:
        return [parameter for parameter in model.parameters() if not parameter.requires_grad]

    module.shard_frozen = sharding


@pytest.mark.parametrize(
    ("processes", "settings"),
    [
        (2, {"gradient_accumulation_steps": 2, "checkpointing_steps": 2}),
        (2, {"gradient_checkpointing": True, "rank": 2, "one_dim": "scalar"}),
        (4, {"form": "recomposed", "use_ema": True, "targets": "attention"}),
        (2, {"mixed_precision": "bf16", "adam_epsilon": 1e-2, "learning_rate": 1e-2, "max_train_steps": 1}),
    ],
    ids=["factored", "residual, checkpointed", "recomposed, of some layers", "bf16"],
)
def test_sharded_factors_train_the_same(team: Team, processes: int, settings: dict[str, Any]) -> None:
    settings = settings | {
        "validation_prompt": ["a dog"], "num_validation_images": 1, "validation_steps": 2,
    }  # fmt: skip
    whole = team.run(1, train_batch_size=4, **settings)
    sharded = team.run(processes, weighing, train_batch_size=4 // processes, shard_factors=True, **settings)
    assert sharded.errors() == [""] * processes
    # In half precision gradients that meet, such as of the timestep's embedding, differ by the order of their sum.
    assert_same(whole, sharded, atol=1e-4 if "mixed_precision" in settings else 1e-5)
    assert_same_pictures(whole, sharded, atol=16 if "mixed_precision" in settings else 1)
    for everything, own in sharded.told("bytes"):
        assert own < everything / processes * 1.1  # rows of a matrix may not divide evenly


def test_a_sharded_run_is_gone_on_with(team: Team) -> None:
    """By a process that keeps all, and the other way round."""
    settings = {"train_text_encoder": True, "checkpointing_steps": 1}
    straight = team.run(1, train_batch_size=2, max_train_steps=3, **settings)
    run = team.run(2, shard_factors=True, max_train_steps=1, **settings)
    settings |= {"output_dir": run.output, "resume_from_checkpoint": "latest"}
    team.run(1, train_batch_size=2, max_train_steps=2, **settings)
    assert_same(straight, team.run(2, shard_factors=True, max_train_steps=3, **settings))


def test_one_process_has_nobody_to_share_factors_with(team: Team) -> None:
    team.start(1, shard_factors=True).says_once("shard_factors needs several processes")


def test_by_a_launcher(team: Team, tmp_path: Path) -> None:
    """The real one, and what it starts as a user would."""
    alone = team.run(1, train_batch_size=2)
    arguments = ["-m", "svdiff", *team.arguments(output_dir=tmp_path / "run")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    done = subprocess.run(command, env=team.env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("numbers (") == 1
    assert_same(alone, Run(tmp_path, tmp_path / "run", [], lambda: [], None))


def serve() -> None:
    """Fork the processes that are asked for on standard input, and say how they end."""
    cli._quieten_libraries()
    for module, names in IMPORTED.items():
        for name in names:
            getattr(importlib.import_module(module), name)
    Image.init()
    gc.freeze()  # or each process would copy all of it when it looks for garbage
    for line in sys.stdin:
        job = json.loads(line)
        pids = []
        for rank in range(job["processes"]):
            if (pid := os.fork()) == 0:
                work(rank, job)
            pids.append(pid)
        print(json.dumps(pids), flush=True)
        print(json.dumps([exit_code(pid, 90) for pid in pids]), flush=True)
    os._exit(0)


def work(rank: int, job: dict[str, Any]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{job['folder']}/{name}.{rank}", os.O_CREAT | os.O_WRONLY), number)
    if job["processes"] > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["processes"]}
        ranks |= {"LOCAL_WORLD_SIZE": job["processes"], "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": job["port"]}
        ranks |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": 0}
        os.environ |= {name: str(value) for name, value in ranks.items()}
    code: Any = 1
    try:
        if job["prepare"]:
            SCENARIOS[job["prepare"]](Path(job["folder"]))
        code = cli.main(job["arguments"])
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # what else Python does at its end takes longer than all the rest


if __name__ == "__main__":
    serve()
