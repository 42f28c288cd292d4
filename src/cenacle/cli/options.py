"""Options that several commands share, each declared once.

Owns: names, types, defaults and help texts of shared options; parsing of lists of numbers.
Does not know: what the options do, MLX.
Invariant: a load option has the name of its field in `runtime.LoadOptions`, but for its unit.
Next: `command.py` turns the dataclasses into options of a command.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import InputError
from .command import option

MODEL_HELP = "Model folder, Hugging Face repository (org/model), or demo."
NODES_HELP = "Number of local processes (ranks)."
BACKEND_HELP = "Backend of the all-reduce between nodes: auto, mesh, ring, mpi, jaccl or nccl."
KERNELS_HELP = "CPU kernels: native (Cenacle's own), mlx, or auto (native where supported)."
PLAN_HELP = "Placement saved by `inspect --save` or `plan --save`; overrides the other options."

ModelNames = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        help=f"{MODEL_HELP} Repeatable: several are loaded when requests name them.",
    ),
]
ModelName = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
PlanFile = Annotated[Path | None, typer.Option(help=PLAN_HELP, rich_help_panel="Placement")]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")
]

Backend = Literal["auto", "mesh", "ring", "mpi", "jaccl", "nccl"]
Kernels = Literal["auto", "native", "mlx"]

placement_option = partial(option, panel="Placement")
execution_option = partial(option, panel="Execution")
memory_option = partial(option, panel="Batching and caches")
server_option = partial(option, panel="Server")
models_option = partial(option, panel="Several models")
sampling_option = partial(option, panel="Sampling")


@dataclass(frozen=True)
class PlacementArguments:
    """Which node holds what."""

    nodes: int = placement_option(1, NODES_HELP, "--nodes", "-n", min=1)
    node_weights: str | None = placement_option(
        None,
        "Relative speed of each node, such as 2,1,1. Default: equal.",
        metavar="W,W,...",
    )
    placement: Literal["auto", "whole", "sliced", "replicated"] = placement_option(
        "auto",
        "Placement of experts: whole (each on one node), sliced (a part of each on every node), "
        "replicated (copies on several nodes) or auto (whole or sliced, by predicted speed).",
        metavar="MODE",
    )
    trunk: Literal["auto", "replicated", "sharded"] = placement_option(
        "auto",
        "Placement of attention, dense layers and output head: replicated (on every node), sharded "
        "(for one more all-reduce each) or auto (by predicted speed).",
        metavar="MODE",
    )
    node_memory_gb: str | None = placement_option(
        None,
        "Gigabytes of weights per node, such as 24,24,16, for --placement replicated. Default: two "
        "copies of each expert.",
        metavar="GB,GB,...",
    )
    latency_ms: float = placement_option(
        0.0, "Milliseconds added to every all-reduce, to emulate a slower network.", min=0
    )

    def to_keywords(self) -> dict[str, Any]:
        """Fields of `LoadOptions`, in its units; all but the model and `nodes`.

        Raises:
            InputError: a list of numbers is malformed.
        """
        names = {field.name for field in fields(self)} - {"nodes", "verify"}
        keywords = {name: getattr(self, name) for name in names}
        memory_gb = parse_float_list(keywords.pop("node_memory_gb"), "node-memory-gb")
        keywords |= {
            "node_weights": parse_float_list(self.node_weights, "node-weights"),
            "node_memory_bytes": [int(1e9 * gb) for gb in memory_gb] if memory_gb else None,
            "latency_s": keywords.pop("latency_ms") / 1000,
        }
        if (folder := keywords.get("prefix_cache_dir")) is not None:
            # Ranks may have another working directory.
            keywords["prefix_cache_dir"] = str(folder.expanduser().absolute())
        return keywords


@dataclass(frozen=True)
class LoadArguments(PlacementArguments):
    """How to load and run a model."""

    backend: Backend = execution_option("auto", BACKEND_HELP, metavar="NAME")
    comm_dtype: Literal["f32", "bf16"] = execution_option(
        "f32",
        "Data type in which the mesh backend sends vectors; bf16 halves the traffic and rounds the "
        "values.",
    )
    kernels: Kernels = execution_option("auto", KERNELS_HELP)
    activations: Literal["int16", "int8"] = execution_option(
        "int16",
        "Integer type of activations in native quantized layers; int8 processes prompts faster and "
        "is less accurate.",
    )
    draft_model: str | None = execution_option(
        None,
        "Draft model for speculative decoding: a small one with the same tokenizer, or a drafter "
        "that was made for the model (EAGLE-3, DFlash, DSpark).",
        metavar="MODEL",
    )
    speculative: Literal["auto", "off", "always"] = execution_option(
        "auto", "Speculative decoding; auto uses it while it is faster."
    )
    mtp: bool = execution_option(
        True,
        "Load the layer for multi-token prediction (MTP) on the first node, if the model has it.",
    )
    images: bool = execution_option(
        True, "Load the vision tower on the first node, if the model has one."
    )
    prefill_chunk_size: int = memory_option(512, "Maximum number of prompt tokens per step.", min=1)
    kv_dtype: Literal["auto", "float32", "float16", "bfloat16"] = memory_option(
        "auto",
        "Data type of the KV cache on CPUs with native kernels; auto is that of the checkpoint. "
        "float32 is exact and twice as large.",
    )
    kv_bits: int | None = memory_option(
        None, "Quantize the KV cache to this many bits, 4 or 8.", metavar="BITS"
    )
    max_kv_size: int | None = memory_option(
        None, "Maximum number of tokens in the KV cache of a request. Default: unlimited.", min=8
    )


@dataclass(frozen=True)
class ServingArguments(LoadArguments):
    """How to load and run a model that serves several clients."""

    max_batch_size: int = memory_option(32, "Maximum number of requests that run at once.", min=1)
    max_queue: int = memory_option(
        64, "Maximum number of waiting requests; further requests get status 429.", min=0
    )
    kv_cache_gb: float | None = memory_option(
        None,
        "Gigabytes per node for the KV cache of running requests. Default: half of the free "
        "memory.",
        min=0,
    )
    prefix_cache_gb: float | None = memory_option(
        None,
        "Gigabytes of memory per node for the prefix cache; 0 disables it. Default: an eighth of "
        "the free memory.",
        min=0,
    )
    prefix_cache_disk_gb: float = memory_option(
        8.0,
        "Gigabytes of disk per node for the prefix cache, which survives restarts; 0 disables it.",
        min=0,
    )
    prefix_cache_dir: Path | None = memory_option(
        None,
        "Folder of the prefix cache on disk, on every node. Default: in the user's cache folder.",
    )
    share_prefixes: bool = memory_option(
        False,
        "Let API keys use each other's prefix caches. Anyone with a key can then find out whether "
        "another key's prompt began with a given text.",
    )
    measure_every: int = execution_option(
        8, "Measure timings of every Nth step; 0 disables it.", min=0
    )
    recover: bool = execution_option(True, "Restart the ranks and resume requests after a failure.")
    verify: bool | None = execution_option(
        None, "Verify weights and answers of the nodes before serving. Default: no."
    )

    def to_keywords(self) -> dict[str, Any]:
        """See `PlacementArguments`."""
        return {**super().to_keywords(), "verify": bool(self.verify)}


@dataclass(frozen=True)
class SamplingArguments:
    """How to choose the tokens of an answer."""

    max_tokens: int = sampling_option(256, "Maximum number of tokens to generate.", min=1)
    temp: float = sampling_option(0.0, "Temperature; 0 is greedy.", min=0, max=2)
    top_p: float = sampling_option(
        1.0, "Nucleus sampling: probability mass to sample from.", min=0, max=1
    )
    top_k: int = sampling_option(0, "Number of most likely tokens to sample from; 0: all.", min=0)
    seed: int | None = sampling_option(None, "Random seed; the same seed gives the same text.")


@dataclass(frozen=True)
class ServerArguments:
    """How to listen for HTTP requests, and which to accept."""

    host: str = server_option("127.0.0.1", "Address on which the API listens.")
    port: int = server_option(8080, "Port of the API; 0 chooses a free port.", min=0, max=65535)
    require_key: bool = server_option(
        False, "Require an API key on the loopback address too.", "--require-key"
    )
    tls: Literal["self"] | None = server_option(None, "Use TLS with a self-signed certificate.")
    tls_cert: Path | None = server_option(None, "TLS certificate (PEM); requires --tls-key.")
    tls_key: Path | None = server_option(None, "Private key of --tls-cert (PEM).")
    allowed_host: list[str] | None = server_option(
        None,
        "Additional Host header to accept on the loopback address, for use behind a proxy; "
        "repeatable.",
    )
    cors_origin: list[str] | None = server_option(
        None,
        "Origin of web pages that may use the API, such as https://chat.example; repeatable.",
        "--cors-origin",
        "--allow-origin",
    )
    served_model_name: list[str] | None = server_option(
        None,
        "Name of the model for clients, instead of its own; repeatable. '*' accepts any name.",
        metavar="NAME",
    )
    max_concurrent: int = server_option(
        256, "Maximum number of answers at once; n=2 counts as two.", min=1
    )
    max_concurrent_per_key: int = server_option(
        64, "Maximum number of answers at once per API key.", min=1
    )
    image_urls: list[str] | None = server_option(
        None,
        "Host from which images may be fetched, such as images.example.com or *.example.com; "
        "repeatable. '*': every public host. Default: none.",
        metavar="HOST",
    )
    max_image_pixels: int = server_option(
        1 << 20,
        "Maximum number of pixels of an image as the model sees it; fewer pixels are faster.",
        min=1024,
    )
    otlp_endpoint: str | None = server_option(
        None,
        "Send OpenTelemetry traces of requests to this collector (OTLP over HTTP), such as "
        "http://127.0.0.1:4318; needs `cenacle[otel]`.",
        metavar="URL",
    )
    log_format: Literal["text", "json"] = server_option(
        "text", "Format of the log on stderr: text, or json with one object per line."
    )
    access_log: bool = server_option(
        False, "Log every request to stderr, without its text.", "--access-log"
    )
    log_text: bool = server_option(
        False, "Log the text of prompts and answers to stderr.", "--log-text"
    )


@dataclass(frozen=True)
class ModelsArguments:
    """Which models are loaded when."""

    models_dir: Path | None = models_option(
        None, "Folder with models, each of which is loaded when a request names it.", metavar="DIR"
    )
    idle_unload: str = models_option(
        "never",
        "Unload a model after this time without a request, such as 30m (s, m, h, d; 0: never).",
        metavar="TIME",
    )
    pin: list[str] | None = models_option(
        None,
        "Name of a model that is loaded at the start and never unloaded; repeatable.",
        metavar="NAME",
    )
    max_loaded: int = models_option(
        0, "Maximum number of loaded models; 0: as many as fit in memory.", min=0
    )
    models_memory_gb: float | None = models_option(
        None,
        "Gigabytes of this machine's memory for all models. Default: what is available.",
        min=0,
    )

    def is_pool(self, models: Sequence[str]) -> bool:
        """Whether models are loaded on demand; else there is one, which is loaded at the start.

        Raises:
            InputError: there is none.
        """
        alone = (None, "never", None, 0, None)
        given = (
            self.models_dir,
            self.idle_unload,
            self.pin or None,
            self.max_loaded,
            self.models_memory_gb,
        )
        if not models and self.models_dir is None:
            raise InputError(
                "--model: expected a folder or a repository, got none; or use --models-dir "
                "with a folder of models",
                "model",
            )
        return len(models) != 1 or given != alone


_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_duration(text: str, name: str) -> float | None:
    """Seconds of a time such as 30m; None: "never" or 0.

    Raises:
        InputError: it is none.
    """
    number, unit = (text[:-1], text[-1:]) if text[-1:] in _UNITS_S else (text, "s")
    try:
        seconds = 0.0 if text == "never" else float(number) * _UNITS_S[unit]
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise InputError(f"--{name}: expected a time such as 30m, or never, got {text!r}", name)
    return seconds or None


def parse_float_list(text: str | None, name: str) -> list[float] | None:
    """Parse numbers separated by commas; None stays None.

    Raises:
        InputError: not a list of finite numbers.
    """
    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"--{name}: expected numbers such as 2,1,1, got {text!r}", name) from error
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(f"--{name}: expected finite numbers, got {text!r}", name)
    return numbers


def parse_int_list(text: str, name: str) -> tuple[int, ...]:
    """Parse positive integers separated by commas.

    Raises:
        InputError: not a list of positive integers.
    """
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise InputError(f"--{name}: expected positive integers such as 1,2,4, got {text!r}", name)
    return numbers
