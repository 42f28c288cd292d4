"""Options that several commands share, each declared once.

Owns: names, types, defaults and help texts of shared options; parsing of lists of numbers.
Does not know: what the options do, MLX.
Invariant: a load option has the name of its field in `runtime.LoadOptions`, but for its unit.
Next: `command.py` turns the dataclasses into options of a command.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import InputError

MODEL_HELP = "Model folder, or the name of a Hugging Face repository (org/model)."

ModelName = Annotated[str, typer.Option("--model", "-m", metavar="MODEL", help=MODEL_HELP)]
JsonOutput = Annotated[
    bool, typer.Option("--json", help="Print one JSON object as the last line of stdout.")
]
_placement = partial(typer.Option, rich_help_panel="Placement")
_execution = partial(typer.Option, rich_help_panel="Execution")
_memory = partial(typer.Option, rich_help_panel="Batching and caches")
_server = partial(typer.Option, rich_help_panel="Server")
_sampling = partial(typer.Option, rich_help_panel="Sampling")

PlanFile = Annotated[
    Path | None,
    _placement(
        "--plan",
        help="Placement saved by `inspect --save` or `plan --save`; overrides the other options.",
    ),
]


Backend = Annotated[
    Literal["auto", "mesh", "ring", "mpi", "jaccl", "nccl"],
    _execution(
        metavar="NAME",
        help="Backend of the all-reduce between nodes: auto, mesh, ring, mpi, jaccl or nccl.",
    ),
]
Kernels = Annotated[
    Literal["auto", "native", "mlx"],
    _execution(help="CPU kernels: native (Cenacle's own), mlx, or auto (native where supported)."),
]


@dataclass(frozen=True)
class PlacementArguments:
    """Which node holds what."""

    nodes: Annotated[
        int,
        _placement("--nodes", "-n", metavar="N", min=1, help="Number of local processes (ranks)."),
    ] = 1
    node_weights: Annotated[
        str | None,
        _placement(
            metavar="W,W,...", help="Relative speed of each node, such as 2,1,1. Default: equal."
        ),
    ] = None
    placement: Annotated[
        Literal["auto", "whole", "sliced", "replicated"],
        _placement(
            metavar="MODE",
            help="Placement of experts: whole (each on one node), sliced (a part of each on every "
            "node), replicated (copies on several nodes) or auto (whole or sliced, by predicted "
            "speed).",
        ),
    ] = "auto"
    trunk: Annotated[
        Literal["auto", "replicated", "sharded"],
        _placement(
            metavar="MODE",
            help="Placement of attention, dense layers and output head: replicated (on every "
            "node), sharded (for one more all-reduce each) or auto (by predicted speed).",
        ),
    ] = "auto"
    node_memory_gb: Annotated[
        str | None,
        _placement(
            metavar="GB,GB,...",
            help="Gigabytes of weights per node, such as 24,24,16, for --placement replicated. "
            "Default: two copies of each expert.",
        ),
    ] = None
    latency_ms: Annotated[
        float,
        _placement(
            metavar="MS",
            min=0,
            help="Milliseconds added to every all-reduce, to emulate a slower network.",
        ),
    ] = 0.0

    def to_keywords(self) -> dict[str, Any]:
        """These arguments as keyword arguments of `api.load`, in its units.

        Raises:
            InputError: a list of numbers is malformed.
        """
        memory_gb = parse_float_list(self.node_memory_gb, "node-memory-gb")
        return {
            "node_weights": parse_float_list(self.node_weights, "node-weights"),
            "placement": self.placement,
            "trunk": self.trunk,
            "node_memory_bytes": [int(1e9 * gb) for gb in memory_gb] if memory_gb else None,
            "latency_s": self.latency_ms / 1000,
        }


@dataclass(frozen=True)
class LoadArguments(PlacementArguments):
    """How to load and run a model."""

    backend: Backend = "auto"
    comm_dtype: Annotated[
        Literal["f32", "bf16"],
        _execution(
            help="Data type in which the mesh backend sends vectors; bf16 halves the traffic and "
            "rounds the values."
        ),
    ] = "f32"
    kernels: Kernels = "auto"
    activations: Annotated[
        Literal["int16", "int8"],
        _execution(
            help="Integer type of activations in native quantized layers; int8 processes prompts "
            "faster and is less accurate."
        ),
    ] = "int16"
    draft_model: Annotated[
        str | None,
        _execution(
            metavar="MODEL", help="Draft model for speculative decoding, with the same tokenizer."
        ),
    ] = None
    speculative: Annotated[
        Literal["auto", "off", "always"],
        _execution(help="Speculative decoding; auto uses it while it is faster."),
    ] = "auto"
    prefill_chunk_size: Annotated[
        int, _memory(metavar="N", min=1, help="Maximum number of prompt tokens per step.")
    ] = 512
    kv_bits: Annotated[
        int | None, _memory(metavar="BITS", help="Quantize the KV cache to this many bits, 4 or 8.")
    ] = None
    max_kv_size: Annotated[
        int | None,
        _memory(
            metavar="N",
            min=8,
            help="Maximum number of tokens in the KV cache of a request. Default: unlimited.",
        ),
    ] = None

    def to_keywords(self) -> dict[str, Any]:
        """See `PlacementArguments`."""
        return {
            **super().to_keywords(),
            "backend": self.backend,
            "comm_dtype": self.comm_dtype,
            "kernels": self.kernels,
            "activations": self.activations,
            "draft_model": self.draft_model,
            "speculative": self.speculative,
            "prefill_chunk_size": self.prefill_chunk_size,
            "kv_bits": self.kv_bits,
            "max_kv_size": self.max_kv_size,
        }


@dataclass(frozen=True)
class ServingArguments(LoadArguments):
    """How to load and run a model that serves several clients."""

    max_batch_size: Annotated[
        int, _memory(metavar="N", min=1, help="Maximum number of requests that run at once.")
    ] = 32
    max_queue: Annotated[
        int,
        _memory(
            metavar="N",
            min=0,
            help="Maximum number of waiting requests; further requests get status 429.",
        ),
    ] = 64
    kv_cache_gb: Annotated[
        float | None,
        _memory(
            metavar="GB",
            min=0,
            help="Gigabytes per node for the KV cache of running requests. Default: half of the "
            "free memory.",
        ),
    ] = None
    prefix_cache_gb: Annotated[
        float | None,
        _memory(
            metavar="GB",
            min=0,
            help="Gigabytes of memory per node for the prefix cache; 0 disables it. Default: an "
            "eighth of the free memory.",
        ),
    ] = None
    prefix_cache_disk_gb: Annotated[
        float,
        _memory(
            metavar="GB",
            min=0,
            help="Gigabytes of disk per node for the prefix cache, which survives restarts; 0 "
            "disables it.",
        ),
    ] = 8.0
    prefix_cache_dir: Annotated[
        Path | None,
        _memory(
            help="Folder of the prefix cache on disk, on every node. Default: in the user's cache "
            "folder."
        ),
    ] = None
    measure_every: Annotated[
        int,
        _execution(metavar="N", min=0, help="Measure timings of every Nth step; 0 disables it."),
    ] = 8
    recover: Annotated[
        bool,
        _execution(
            "--recover/--no-recover", help="Restart the ranks and resume requests after a failure."
        ),
    ] = True
    verify: Annotated[
        bool | None,
        _execution(
            "--verify/--no-verify",
            help="Verify weights and answers of the nodes before serving. Default: no.",
        ),
    ] = None

    def to_keywords(self) -> dict[str, Any]:
        """See `PlacementArguments`."""
        folder = self.prefix_cache_dir
        return {
            **super().to_keywords(),
            "max_batch_size": self.max_batch_size,
            "max_queue": self.max_queue,
            "kv_cache_gb": self.kv_cache_gb,
            "prefix_cache_gb": self.prefix_cache_gb,
            "prefix_cache_disk_gb": self.prefix_cache_disk_gb,
            # Ranks may have another working directory.
            "prefix_cache_dir": str(folder.expanduser().absolute()) if folder else None,
            "measure_every": self.measure_every,
            "recover": self.recover,
        }


@dataclass(frozen=True)
class SamplingArguments:
    """How to choose the tokens of an answer."""

    max_tokens: Annotated[
        int, _sampling(metavar="N", min=1, help="Maximum number of tokens to generate.")
    ] = 256
    temp: Annotated[
        float, _sampling(metavar="T", min=0, max=2, help="Temperature; 0 is greedy.")
    ] = 0.0
    top_p: Annotated[
        float,
        _sampling(
            metavar="P", min=0, max=1, help="Nucleus sampling: probability mass to sample from."
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        _sampling(metavar="N", min=0, help="Number of most likely tokens to sample from; 0: all."),
    ] = 0
    seed: Annotated[
        int | None, _sampling(metavar="N", help="Random seed; the same seed gives the same text.")
    ] = None


@dataclass(frozen=True)
class ServerArguments:
    """How to listen for HTTP requests, and which to accept."""

    host: Annotated[str, _server(help="Address on which the API listens.")] = "127.0.0.1"
    port: Annotated[
        int, _server(metavar="N", min=0, max=65535, help="Port of the API; 0 chooses a free port.")
    ] = 8080
    require_key: Annotated[
        bool, _server("--require-key", help="Require an API key on the loopback address too.")
    ] = False
    tls: Annotated[
        Literal["self"] | None, _server(help="Use TLS with a self-signed certificate.")
    ] = None
    tls_cert: Annotated[Path | None, _server(help="TLS certificate (PEM); requires --tls-key.")] = (
        None
    )
    tls_key: Annotated[Path | None, _server(help="Private key of --tls-cert (PEM).")] = None
    allowed_host: Annotated[
        list[str] | None,
        _server(
            help="Additional Host header to accept on the loopback address, for use behind a "
            "proxy; repeatable."
        ),
    ] = None
    cors_origin: Annotated[
        list[str] | None,
        _server(
            help="Origin of web pages that may use the API, such as https://chat.example; "
            "repeatable."
        ),
    ] = None
    max_concurrent: Annotated[
        int, _server(metavar="N", min=1, help="Maximum number of HTTP requests answered at once.")
    ] = 256
    max_concurrent_per_key: Annotated[
        int,
        _server(
            metavar="N", min=1, help="Maximum number of HTTP requests answered at once per API key."
        ),
    ] = 64
    access_log: Annotated[
        bool, _server("--access-log", help="Log every request to stderr, without its text.")
    ] = False
    log_text: Annotated[
        bool, _server("--log-text", help="Log the text of prompts and answers to stderr.")
    ] = False


def parse_float_list(text: str | None, option: str) -> list[float] | None:
    """Parse numbers separated by commas; None stays None.

    Raises:
        InputError: not a list of finite numbers.
    """
    if text is None:
        return None
    try:
        numbers = [float(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(
            f"--{option}: expected numbers such as 2,1,1, got {text!r}", option
        ) from error
    if not all(math.isfinite(number) for number in numbers):
        raise InputError(f"--{option}: expected finite numbers, got {text!r}", option)
    return numbers


def parse_int_list(text: str, option: str) -> tuple[int, ...]:
    """Parse positive integers separated by commas.

    Raises:
        InputError: not a list of positive integers.
    """
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise InputError(
            f"--{option}: expected positive integers such as 1,2,4, got {text!r}", option
        )
    return numbers
