"""The page and its server: one process that draws, and starts a process for whatever trains."""

from __future__ import annotations

import html
import importlib.util
import os
import socket
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from svdiff_kernels import SVDiffError

from .child import Children
from .runs import Runs


@dataclass
class UIConfig:
    """Settings of `ui`; each is a flag of ``svdiff ui``."""

    pretrained_model_name_or_path: str = field(
        default="miniature", metadata={"help": "what is trained and draws: folder, hub id, or miniature"}
    )
    output_dir: str = field(default="outputs", metadata={"help": "folder of runs; each is a folder in it"})
    dtype: Literal["fp32", "fp16", "bf16"] = field(
        default="fp32", metadata={"help": "precision of the model that draws on the page"}
    )
    host: str = field(
        default="127.0.0.1", metadata={"help": "address to listen at; 0.0.0.0 lets other machines in, whoever they are"}
    )
    port: int = field(default=7860, metadata={"help": "to listen at"})
    open_browser: bool = field(default=False, metadata={"help": "show the page in the default browser"})


def ui(config: UIConfig) -> None:
    """Serve the page until told to end; what trains then saves a checkpoint first.

    Raises:
        SVDiffError: gradio is not installed, the port cannot be used, or output_dir cannot be written.
    """
    if importlib.util.find_spec("gradio") is None:
        raise SVDiffError('the page needs gradio, which is not installed: pip install "svdiff-kernels[ui]"')
    runs, children = Runs(Path(config.output_dir).expanduser()), Children()
    _check_port(config)
    with tempfile.TemporaryDirectory(prefix="svdiff-ui-") as uploads:
        # gradio reads these when it is imported, and when it makes components: nothing is told to anybody, and what was
        # uploaded and drawn goes with the server
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": uploads}
        page = build(config, runs, children)
        try:
            _launch(page, config)
            print(f"svdiff ui is at http://{config.host}:{config.port} and Ctrl-C ends it", flush=True)
            threading.Event().wait()
        finally:
            children.end()
            page.close(verbose=False)


def build(config: UIConfig, runs: Runs, children: Children) -> Any:
    """The page, a ``gradio.Blocks``, not yet served."""
    import gradio as gr

    from . import suggested
    from .artist import Artist
    from .edit_tab import EditTab
    from .generate_tab import GenerateTab
    from .train_tab import TrainTab

    model = config.pretrained_model_name_or_path
    with gr.Blocks(title="svdiff", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(
            f"<h1>SVDiff</h1><p>Teach a model by the singular values of its weights · {_shown(model)}</p>",
            elem_classes="title",
        )
        with gr.Tab("Train", id="train"):
            TrainTab(page, runs, children, suggested.to_train(model))
        with gr.Tab("Generate", id="generate") as tab:
            GenerateTab(page, tab, runs, Artist(model, config.dtype), suggested.to_generate(model))
        with gr.Tab("Edit", id="edit"):
            EditTab(page, runs, children, suggested.to_edit(model))
    return page


def _launch(page: Any, config: UIConfig) -> None:
    from . import look

    try:
        page.launch(
            server_name=config.host,
            server_port=config.port,
            inbrowser=config.open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            ssr_mode=False,
            enable_monitoring=False,
            run_history=False,
            footer_links=[],
            allowed_paths=[],
            max_file_size="100mb",
            theme=look.theme(),
            css=look.CSS,
        )
    except OSError as error:  # another has been faster
        raise _no_port(config, error) from error


def _check_port(config: UIConfig) -> None:
    """Before gradio's seconds of imports; and it would say less."""
    if not 0 < config.port < 2**16:
        raise SVDiffError(f"port {config.port} is none: they go from 1 to {2**16 - 1}")
    try:
        family, kind, *_, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise _no_port(config, error) from error


def _no_port(config: UIConfig, error: OSError) -> SVDiffError:
    reason = error.strerror or error
    return SVDiffError(f"cannot listen at {config.host}, port {config.port} ({reason}): choose another with --port")


def _shown(model: str) -> str:
    return html.escape(model if model == "miniature" or not Path(model).exists() else Path(model).name)
