"""The verbs: `cenacle generate`, `chat`, `serve`, `inspect`, `families`, `synth`, `bench`, `demo`;
those of the performance model are in `cli_plan.py`, `keys` in `cli_keys.py`.

Owns: arguments, what is printed where, exit codes. Everything else is `api`'s and the rooms' below.
Invariant: answers go to stdout, everything else to stderr; with --json the last line of stdout is
one JSON object; an error is one sentence on stderr and a non-zero exit status (see `errors`).
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..core.units import format_bytes
from ..errors import CenacleError, InputError
from . import cluster as cluster_commands
from . import doctor
from . import keys as key_commands
from . import plan as plan_commands
from .bench import bench_app
from .options import (
    Activations,
    ActivationsName,
    AsJson,
    Backend,
    BackendName,
    Batch,
    BudgetsGB,
    DraftName,
    Kernels,
    KernelsName,
    KVBits,
    LatencyMs,
    MaxKV,
    MaxTokens,
    ModelName,
    Nodes,
    Placement,
    PlacementName,
    PlanFile,
    PrefillChunk,
    Seed,
    Shares,
    Speculate,
    SpeculateName,
    Temp,
    TopK,
    TopP,
    Trunk,
    TrunkName,
    Wire,
    WireName,
    _dealt,
    _loaded,
    _plain,
    _progress,
    _saying,
    app,
    err,
)

if TYPE_CHECKING:
    from ..verification import SelfTest

app.add_typer(bench_app, name="bench")
app.add_typer(key_commands.keys_app, name="keys")


def main() -> None:
    """The program's entry: errors become one sentence and an exit status."""
    # Ending by SIGTERM must run the same `finally` blocks as Ctrl-C: they end the ranks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        app(standalone_mode=True)
    except CenacleError as error:
        err.print(f"[bold red]error:[/] {_plain(str(error))}", soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@app.command()
def generate(
    model: ModelName,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask; - reads stdin.")],
    nodes: Nodes = 1,
    max_tokens: MaxTokens = 256,
    temp: Temp = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    raw: Annotated[bool, typer.Option(help="Do not apply the model's chat template.")] = False,
    shares: Shares = None,
    placement: PlacementName = Placement.auto,
    trunk: TrunkName = Trunk.auto,
    budgets_gb: BudgetsGB = None,
    plan: PlanFile = None,
    backend: BackendName = Backend.auto,
    wire: WireName = Wire.f32,
    kernels: KernelsName = Kernels.auto,
    activations: ActivationsName = Activations.int16,
    latency_ms: LatencyMs = 0.0,
    prefill_chunk: PrefillChunk = 512,
    kv_bits: KVBits = None,
    max_kv_size: MaxKV = None,
    speculate: SpeculateName = Speculate.auto,
    draft: DraftName = None,
    as_json: AsJson = False,
) -> None:
    """Answer one prompt.

    Example: [bold]cenacle generate -m DIR -n 2 -p "What is 12 + 30?" --temp 0 --json[/]
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    with _loaded(
        model,
        nodes,
        _dealt(shares, placement, trunk, budgets_gb),
        plan,
        backend,
        wire,
        kernels,
        activations,
        latency_ms,
        prefill_chunk,
        32,
        kv_bits,
        max_kv_size,
        draft=draft,
        speculative=speculate.value,
    ) as loaded:
        ids = loaded.text.encode(text) if raw else loaded.tokens_of(text)
        answer = loaded.generate(
            ids, max_tokens, temperature=temp, top_p=top_p, top_k=top_k, seed=seed
        )
        if as_json:
            # The same fields as in Python, and what each rank is.
            print(json.dumps({**answer.to_json(), "ranks": loaded.ranks_json()}))
        else:
            print(answer.text)
            err.print(
                f"{answer.prompt_tokens} prompt tokens, first token after "
                f"{answer.first_token_s:.2f} s; {len(answer.tokens)} tokens at "
                f"{answer.tok_per_s:.1f} a second on {answer.nodes} nodes"
            )


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A folder or a hub name; with --url: its name there."),
    ] = None,
    nodes: Nodes = 1,
    url: Annotated[
        str | None, typer.Option(help="Talk with a server, at http://HOST:PORT.")
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="CENACLE_API_KEY", help="The server's API key.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="The server's certificate, if it made its own; PEM.")
    ] = None,
    max_tokens: MaxTokens = 1024,
    temp: Temp = 0.7,
    top_p: TopP = 0.95,
    seed: Seed = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    history: Annotated[bool, typer.Option(help="Keep questions for the arrow keys.")] = True,
    shares: Shares = None,
    placement: PlacementName = Placement.auto,
    trunk: TrunkName = Trunk.auto,
    budgets_gb: BudgetsGB = None,
    plan: PlanFile = None,
    backend: BackendName = Backend.auto,
    wire: WireName = Wire.f32,
    kernels: KernelsName = Kernels.auto,
    activations: ActivationsName = Activations.int16,
    kv_bits: KVBits = None,
    speculate: SpeculateName = Speculate.auto,
    draft: DraftName = None,
) -> None:
    """Talk with a model in the terminal, here or on a server. /help lists commands, Ctrl-D ends.

    Example: [bold]cenacle chat -m org/model -n 2[/]
    """
    from ..paths import chat_history_file
    from .chat import ChatSession, ChatSettings, LocalChat, RemoteChat

    how = ChatSettings(max_tokens, temp, top_p, seed)
    kept = chat_history_file() if history else None
    if url is not None:
        with closing(RemoteChat(url, key, model, certificate)) as remote:
            ChatSession(remote, how, system or "").loop(kept)
        return
    if model is None:
        raise InputError("--model: expected a folder or a hub name, or a server with --url")
    dealt = _dealt(shares, placement, trunk, budgets_gb)
    with _loaded(
        model,
        nodes,
        dealt,
        plan,
        backend,
        wire,
        kernels,
        activations,
        0.0,
        512,
        32,
        kv_bits,
        None,
        draft=draft,
        speculative=speculate.value,
    ) as loaded:
        ChatSession(LocalChat(loaded), how, system or "").loop(kept)


@app.command()
def serve(
    model: ModelName,
    nodes: Nodes = 1,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8080,
    shares: Shares = None,
    placement: PlacementName = Placement.auto,
    trunk: TrunkName = Trunk.auto,
    budgets_gb: BudgetsGB = None,
    plan: PlanFile = None,
    backend: BackendName = Backend.auto,
    wire: WireName = Wire.f32,
    kernels: KernelsName = Kernels.auto,
    activations: ActivationsName = Activations.int16,
    prefill_chunk: PrefillChunk = 512,
    batch: Batch = 32,
    kv_bits: KVBits = None,
    max_kv_size: MaxKV = None,
    speculate: SpeculateName = Speculate.auto,
    draft: DraftName = None,
    require_key: key_commands.RequireKey = False,
    tls: key_commands.Tls = None,
    tls_cert: key_commands.TlsCert = None,
    tls_key: key_commands.TlsKey = None,
    cors_origin: key_commands.CorsOrigin = None,
    allowed_host: key_commands.AllowedHost = None,
    streams: key_commands.MaxConcurrent = 256,
    streams_per_key: key_commands.MaxConcurrentPerKey = 64,
    access_log: key_commands.AccessLog = False,
    log_text: key_commands.LogText = False,
    queue: Annotated[int, typer.Option(min=0, help="Most requests that wait; then 429.")] = 64,
    kv_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Gigabytes of cache per node for requests that run together."),
    ] = None,
    cache_gb: Annotated[
        float | None,
        typer.Option(min=0, help="Gigabytes per node for prompts that may come again; 0: none."),
    ] = None,
    cache_dir: cluster_commands.CacheDir = None,
    cache_disk_gb: cluster_commands.CacheDiskGB = cluster_commands.CACHE_DISK_GB,
    selftest: Annotated[
        bool,
        typer.Option("--selftest", help="First check what the nodes compute, and their weights."),
    ] = False,
) -> None:
    """Serve OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models, /health.

    Example: [bold]cenacle serve -m DIR -n 2 --port 8080[/]
    """
    from ..server.http_server import bind
    from ..server.http_server import serve as run

    # First the port: it is cheap to find out that it is taken, and loading is not.
    with bind(host, port) as sock:
        policy = key_commands.access_policy(
            sock,
            require_key=require_key,
            hosts=allowed_host,
            cors_origins=cors_origin,
            streams=streams,
            streams_per_key=streams_per_key,
            access_log=access_log,
            log_text=log_text,
        )
        context = key_commands.tls_context(host, tls, tls_cert, tls_key)
        if policy.require_key and context is None:
            err.print("without TLS keys and answers can be read on the way; see --tls")
        with _loaded(
            model,
            nodes,
            _dealt(shares, placement, trunk, budgets_gb),
            plan,
            backend,
            wire,
            kernels,
            activations,
            0.0,
            prefill_chunk,
            batch,
            kv_bits,
            max_kv_size,
            max_queue=queue,
            kv_cache_gb=kv_gb,
            draft=draft,
            speculative=speculate.value,
            prefix_cache_gb=cache_gb,
            prefix_cache_disk_gb=cache_disk_gb,
            prefix_cache_dir=cluster_commands.absolute(cache_dir),
            selftest=_selftest() if selftest else None,
        ) as loaded:
            run(
                loaded,
                sock,
                on_started=lambda url: err.print(f"serving {loaded.name} at {url}"),
                policy=policy,
                tls=context,
            )


@app.command()
def inspect(
    model: ModelName,
    nodes: Nodes = 1,
    shares: Shares = None,
    placement: PlacementName = Placement.auto,
    trunk: TrunkName = Trunk.auto,
    budgets_gb: BudgetsGB = None,
    save: Annotated[Path | None, typer.Option(help="Write the plan to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """What a checkpoint is, and what each of N nodes would hold; reads no weights.

    Example: [bold]cenacle inspect -m DIR -n 3 --json[/]
    """
    from ..runtime import LoadOptions, choose

    plan, reason = choose(LoadOptions(model, nodes, **_dealt(shares, placement, trunk, budgets_gb)))
    if save is not None:
        plan.save(save)
    spec = plan.spec
    if as_json:
        per_rank = [plan.bytes_of(r) for r in range(plan.nodes)]
        print(
            json.dumps(
                {
                    "model": model,
                    "spec": spec.to_json(),
                    "nodes": plan.nodes,
                    "placement": plan.placement,
                    "trunk": plan.trunk,
                    "reason": reason,
                    "exchanges": plan.all_reduces if plan.nodes > 1 else 0,
                    "total_bytes": spec.total_bytes,
                    "bytes_per_rank": [b["total"] for b in per_rank],
                    "ranks": per_rank,
                }
            )
        )
        return
    first = spec.moe[0]
    print(f"family      {spec.family}, {spec.layers} layers, {len(spec.moe)} with experts")
    each, whole = format_bytes(first.expert_bytes), format_bytes(spec.total_bytes)
    print(f"experts     {first.experts} a layer, {spec.top_k} per token, {each} each")
    print(f"weights     {whole}, {spec.dtype}, {spec.quantization or 'not quantised'}")
    print(f"context     {spec.context_length or 'not said'} tokens, vocabulary {spec.vocab_size}")
    if plan.nodes > 1:
        print(
            f"placement   experts {plan.placement}, trunk {plan.trunk}, "
            f"{plan.all_reduces} exchanges a token"
        )
    print(plan.table())
    if reason:
        err.print(_plain(reason), soft_wrap=True)


@app.command()
def families(as_json: AsJson = False) -> None:
    """The model families that work, and what is special about each.

    Example: [bold]cenacle families[/]
    """
    from ..model.families import list_families

    rows = list_families()
    if as_json:
        print(json.dumps([r.to_json() for r in rows]))
        return
    table = Table("family", "also", "works", "note", box=None)
    for row in rows:
        also, works = ", ".join(row.aliases), "yes" if row.refused is None else "no"
        table.add_row(row.name, also, works, row.refused or row.note)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


@app.command()
def synth(
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    family: Annotated[str | None, typer.Option(help="A family, small (see `families`).")] = None,
    name: Annotated[str | None, typer.Option(help="A real model's shape (see --list).")] = None,
    config: Annotated[Path | None, typer.Option(help="A config.json.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Fewer layers than that.")] = None,
    quantize: Annotated[int | None, typer.Option(help="Bits: 2, 3, 4, 5, 6 or 8.")] = None,
    group_size: Annotated[int, typer.Option(help="Weights per scale: 32, 64 or 128.")] = 64,
    mode: Annotated[str, typer.Option(help="affine or mxfp4.")] = "affine",
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    overwrite: Annotated[bool, typer.Option(help="Write into a folder that is not empty.")] = False,
    show: Annotated[bool, typer.Option("--list", help="List the names and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint of random weights: to test, or to measure a machine before a download.

    Example: [bold]cenacle synth --name dbrx-132b --layers 2 --quantize 4 --out DIR[/]
    """
    from rich.progress import Progress

    from ..model import synth as writer

    if show:
        print("families:", *writer.family_names())
        print("names:", *writer.model_catalogue())
        return
    if out is None:
        raise InputError("--out: expected a folder to write, got none", "out")
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bars:
        bar = bars.add_task("writing", total=None)
        made = writer.synth(
            out,
            family=family,
            name=name,
            config=config,
            layers=layers,
            quantize=quantize,
            group_size=group_size,
            mode=mode,
            dtype=dtype,
            seed=seed,
            overwrite=overwrite,
            progress=lambda done, total: bars.update(bar, completed=done, total=total),
        )
    if as_json:
        print(json.dumps({**asdict(made), "path": str(made.path)}))
    else:
        print(
            f"{made.path}: {made.family}, {made.layers} layers, {made.parameters / 1e6:.1f} M "
            f"parameters, {format_bytes(made.bytes)} in {made.shards} files"
        )


@app.command()
def demo(
    nodes: Nodes = 2,
    questions: Annotated[int, typer.Option(min=1, help="How many questions.")] = 8,
    seed: Annotated[int, typer.Option(help="Which questions.")] = 0,
    placement: PlacementName = Placement.whole,
    trunk: TrunkName = Trunk.replicated,
    as_json: AsJson = False,
) -> None:
    """Two nodes answer questions with a small trained DBRX, and show how they did it.

    Example: [bold]cenacle demo --nodes 2[/]
    """
    from ..demo.run import run_demo

    dealt = _dealt(None, placement, trunk, None)
    result = run_demo(nodes, questions, seed, Console(), _progress, dealt)
    if as_json:
        print(json.dumps(result))
    if result["right"] < 0.5 * result["asked"]:
        raise CenacleError(
            f"the demo model answered {result['right']} of {result['asked']} questions; "
            f"expected most of them: this installation computes something wrong"
        )


plan_commands.register(app)
doctor.register(app)


def _selftest() -> SelfTest:
    from ..paths import config_dir
    from ..verification import SelfTest

    return SelfTest(config_dir(), say=_saying())


cluster_commands.register(app, _progress)


if __name__ == "__main__":
    main()
