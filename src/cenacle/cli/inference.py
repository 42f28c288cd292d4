"""The commands that run a model: `cenacle generate`, `chat`, `serve`.

Owns: their options and output; loading a model and opening a server for them and for `up`.
Does not know: how a model is loaded (`api`), how requests are answered (`server`).
Next: `cluster.py` has `up`, which serves a model from several machines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from ..images.fetch import AllowedHosts
from ..logs import LogFormat, configure_logging
from . import keys
from .command import command
from .console import loading_progress, print_json, read_stdin, report, stderr_console
from .early_checks import check_model, check_otlp_endpoint
from .options import (
    MODEL_HELP,
    JsonOutput,
    LoadArguments,
    ModelName,
    ModelNames,
    ModelsArguments,
    PlanFile,
    SamplingArguments,
    ServerArguments,
    ServingArguments,
    parse_duration,
)

if TYPE_CHECKING:
    import ssl

    from ..api import Model
    from ..cluster.formation import Cluster
    from ..server.access_policy import AccessPolicy
    from ..server.http_server import ServerOptions
    from ..server.model_catalog import ModelEntry
    from ..server.model_pool import PoolOptions
    from ..server.supervisor import SupervisedProcess

app = typer.Typer()
PANEL = "Run a model"
MIN_TOKENS_FOR_SPEED = 4
CHAT_SAMPLING = SamplingArguments(max_tokens=1024, temp=0.7, top_p=0.95)


@command(
    app, example='cenacle generate -m DIR -n 2 -p "What is 12 + 30?" --temp 0 --json', panel=PANEL
)
def generate(
    model: ModelName,
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            help="Prompt. Default: standard input, if it is a pipe or a file; - always reads it.",
        ),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Do not apply the chat template of the model.")
    ] = False,
    json_output: JsonOutput = False,
    *,
    sampling: SamplingArguments,
    load: LoadArguments,
    plan: PlanFile = None,
) -> None:
    """Generate the answer to one prompt."""
    model = check_model(model)
    text = prompt
    if prompt == "-" or (prompt is None and not sys.stdin.isatty()):
        text = read_stdin("prompt")
    if text is None or (prompt is None and not text):
        raise InputError(
            "--prompt: expected a value, got none; give it with -p or through a pipe", "prompt"
        )
    with load_model(model, load, plan) as loaded, isolate_text(loaded):
        tokens = loaded.text.encode(text) if raw else loaded.tokens_of(text)
        completion = loaded.generate(
            tokens,
            sampling.max_tokens,
            temperature=sampling.temp,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            seed=sampling.seed,
        )
        if json_output:
            print_json({**completion.to_json(), "ranks": loaded.ranks_json()})
            return
        print(completion.text)
        nodes = f"{completion.nodes} node{'s' * (completion.nodes > 1)}"
        count = len(completion.tokens)
        # Drafts bring several tokens at once, so the speed of a few tokens means nothing.
        speed = f", {completion.tok_per_s:.1f} tok/s" * (count >= MIN_TOKENS_FOR_SPEED)
        report(
            f"{completion.prompt_tokens} prompt token{'s' * (completion.prompt_tokens > 1)}, time "
            f"to first token {completion.first_token_s:.2f} s; {count} "
            f"token{'s' * (count != 1)} generated{speed} on {nodes}"
        )


@command(app, example="cenacle chat -m org/model -n 2", panel=PANEL)
def chat(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help=f"{MODEL_HELP} With --url: its name on the server.",
        ),
    ] = None,
    url: Annotated[
        str | None,
        typer.Option(metavar="URL", help="Chat with a server, such as http://HOST:PORT."),
    ] = None,
    key: Annotated[
        str | None, typer.Option(envvar="CENACLE_API_KEY", help="API key of the server.")
    ] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="Certificate of the server (PEM), if it is self-signed.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Image to attach to the first question; repeatable."),
    ] = None,
    history: Annotated[
        bool, typer.Option(help="Save prompts, to recall them with the arrow keys.")
    ] = True,
    *,
    sampling: SamplingArguments = CHAT_SAMPLING,
    load: LoadArguments,
    plan: PlanFile = None,
) -> None:
    """Chat in the terminal with a local model or a server; /help lists the commands."""
    from ..paths import chat_history_file
    from .chat import ChatSession, read_image
    from .chat_sources import ChatSettings, LocalChat, RemoteChat

    settings = ChatSettings(
        sampling.max_tokens,
        sampling.temp,
        sampling.top_p,
        sampling.seed,
        sampling.top_k or None,
    )
    history_path = chat_history_file() if history else None
    images = [read_image(path.expanduser()) for path in image or ()]
    if url is not None:
        with closing(RemoteChat(url, key, model, certificate)) as remote:
            ChatSession(remote, settings, system or "", images=images).run(history_path)
        return
    if model is None:
        raise InputError(
            "--model: expected a folder or a repository, got none; or use --url with a server",
            "model",
        )
    model = check_model(model)
    with load_model(model, load, plan) as loaded, isolate_text(loaded):
        ChatSession(LocalChat(loaded), settings, system or "", images=images).run(history_path)


@command(app, example="cenacle serve -m DIR -n 2 --port 8080", panel=PANEL)
def serve(
    model: ModelNames = None,
    *,
    models: ModelsArguments,
    server: ServerArguments,
    load: ServingArguments,
    plan: PlanFile = None,
) -> None:
    """Serve models through HTTP: the APIs of OpenAI (chat completions, completions, responses) and
    Anthropic (messages), tokenization as in vLLM and llama.cpp, metrics, and a web page.
    """
    given = [check_model(name) for name in model or ()]
    use_log_format(server.log_format)
    is_pool = models.is_pool(given)
    # A port in use is found before the model is loaded.
    with open_server(server) as endpoint:
        if is_pool:
            several = read_models(given, models, load, endpoint.model_names, plan)
            endpoint.serve_models(several, lambda url: report(f"serving {several.title} at {url}"))
            return
        with load_model(given[0], load, plan, while_loading=import_server) as loaded:
            endpoint.serve(loaded, lambda url: report_serving(loaded, url, endpoint))


def import_server() -> None:
    """Import what answers requests: half a second that is spared once a model is loaded."""
    import_module("cenacle.server.http_server")


def use_log_format(log_format: str) -> None:
    """Log on stderr in the form of `--log-format`."""
    LogFormat.is_json = log_format == "json"
    configure_logging()


def report_serving(model: Model, url: str, endpoint: Endpoint) -> None:
    """Report that a model is served."""
    report(f"serving {model.name} at {url}")
    greet(model, url, endpoint)


def greet(model: Model, url: str, endpoint: Endpoint) -> None:
    """Say on a terminal what the owner of a server needs next."""
    if stderr_console.is_terminal and not LogFormat.is_json:
        from .greeting import compose_greeting

        for line in compose_greeting(model, url, endpoint.policy.require_key, endpoint.tls):
            report(line)


@contextmanager
def isolate_text(model: Model) -> Iterator[None]:
    """Run the chat template and the tokenizer of a checkpoint in a process with limits."""
    model.text.isolate()
    with closing(model.text):
        yield


@dataclass(frozen=True)
class Endpoint:
    """Who may connect how, and the names of the model, in the process that serves."""

    policy: AccessPolicy
    tls: ssl.SSLContext | None
    process: SupervisedProcess
    model_names: tuple[str, ...] = ()
    image_hosts: AllowedHosts = field(default_factory=AllowedHosts)
    max_image_pixels: int = 1 << 20
    otlp_endpoint: str | None = None

    def serve(self, model: Model, on_started: Callable[[str], None]) -> None:
        """Answer requests until the program is ended; `on_started` gets the URL."""
        from ..server.http_server import serve

        def report_started(url: str) -> None:
            self.process.report_ready()
            on_started(url)

        serve(
            model,
            self.process.sock,
            on_started=report_started,
            options=self._server_options,
            names=self.model_names,
        )

    def refuse(self, describe: Callable[[], str]) -> AbstractContextManager[None]:
        """Answer requests with 503 and the present reason, while no model is loaded yet."""
        from ..server.refusal import refuse

        return refuse(self.process.sock, describe, self.policy, self.tls)

    def serve_models(
        self,
        models: SeveralModels,
        on_started: Callable[[str], None],
        cluster: Cluster | None = None,
        on_loaded: Callable[[Model], None] = lambda _: None,
    ) -> None:
        """Answer requests until the program is ended, and load models when they are named.

        Args:
            models: see `read_models`.
            on_started: gets the URL.
            cluster: models run on its nodes.
            on_loaded: told which model is loaded; in another thread.
        """
        from ..server.http_server import serve_models

        def report_started(url: str) -> None:
            self.process.report_ready()
            on_started(url)

        serve_models(
            models.catalog,
            self.process.sock,
            models.pool,
            on_started=report_started,
            options=self._server_options,
            names=models.names,
            cluster=cluster,
            report=report,
            on_loaded=on_loaded,
            max_waiting=models.max_waiting,
        )

    @property
    def _server_options(self) -> ServerOptions:
        from ..server.http_server import ServerOptions
        from ..server.limits import Limits

        return ServerOptions(
            Limits(max_image_pixels=self.max_image_pixels, image_hosts=self.image_hosts),
            self.policy,
            self.tls,
            self.process.restarts,
            self.otlp_endpoint,
        )


@dataclass(frozen=True)
class SeveralModels:
    """Models that are loaded on demand.

    Args:
        catalog: by name.
        pool: when they are loaded and unloaded.
        names: of each for clients.
        max_waiting: most requests that wait for one of them.
    """

    catalog: Mapping[str, ModelEntry]
    pool: PoolOptions
    names: Mapping[str, Sequence[str]]
    max_waiting: int

    @property
    def title(self) -> str:
        """What is served, in a few words."""
        names = list(self.catalog)
        return names[0] if len(names) == 1 else f"{len(names)} models ({', '.join(names)})"


def read_models(
    models: Sequence[str],
    arguments: ModelsArguments,
    load: ServingArguments,
    names: Sequence[str],
    plan: Path | None = None,
    *,
    on_cluster: bool = False,
) -> SeveralModels:
    """The models that are to be loaded on demand.

    Args:
        models: folders or repositories.
        arguments, load: of the command line.
        names: for clients.
        plan: file with a saved placement, of a single model.
        on_cluster: they run on the nodes of a cluster.

    Raises:
        InputError: options that do not go together.
        CheckpointError: a model that cannot be read.
    """
    from ..core.plan import Plan
    from ..load_options import LoadOptions
    from ..server.model_catalog import read_catalog
    from ..server.model_pool import PoolOptions

    saved_plan = Plan.load(plan) if plan is not None else None
    options = LoadOptions("", load.nodes, plan=saved_plan, **load.to_keywords())
    folder = arguments.models_dir.expanduser() if arguments.models_dir is not None else None
    catalog = read_catalog(models, folder, options, report)
    for_one: dict[str, Any] = {"--plan": plan, "--draft-model": load.draft_model}
    for_one["--served-model-name"] = [name for name in names if name != "*"] or None
    for option, value in for_one.items():
        if value is not None and len(catalog) > 1:
            raise InputError(f"{option}: expected one model, got {len(catalog)}", option[2:])
    unknown = [name for name in arguments.pin or () if name not in catalog]
    if unknown:
        known = ", ".join(catalog)
        raise InputError(f"--pin: expected the name of a model ({known}), got {unknown[0]}", "pin")
    max_loaded, memory_gb = arguments.max_loaded or None, arguments.models_memory_gb
    if on_cluster:
        if (max_loaded or 1) > 1:
            raise InputError("--max-loaded: a cluster has one model loaded at once", "max-loaded")
        if memory_gb is not None:
            raise InputError("--models-memory-gb: only for `cenacle serve`", "models-memory-gb")
        max_loaded = 1
    if max_loaded is not None and len(set(arguments.pin or ())) > max_loaded:
        raise InputError(f"--pin: expected at most {max_loaded} models, which may be loaded", "pin")
    pool = PoolOptions(
        parse_duration(arguments.idle_unload, "idle-unload"),
        max_loaded,
        int(memory_gb * 1e9) if memory_gb is not None else None,
        pinned=frozenset(arguments.pin or ()),
    )
    first = next(iter(catalog))
    by_name = {name: tuple(names) if name == first else () for name in catalog}
    return SeveralModels(catalog, pool, by_name, max(load.max_queue, 1))


@contextmanager
def open_server(arguments: ServerArguments) -> Iterator[Endpoint]:
    """Bind the port of the API, and prepare API keys and TLS.

    Everything that follows happens in a process of its own, which is started again when it dies.

    Raises:
        InputError: the port is in use, there is no API key, or the TLS files cannot be used.
        typer.Exit: that process has ended.
    """
    from ..net import bind
    from ..server.supervisor import SupervisedProcess, supervise

    names = tuple(arguments.served_model_name or ())
    image_hosts = AllowedHosts.parse(arguments.image_urls or ())
    if not all(names):
        raise InputError("--served-model-name: expected a name, got an empty one", "served-name")
    if arguments.otlp_endpoint is not None:
        check_otlp_endpoint(arguments.otlp_endpoint)
    process = SupervisedProcess.from_environment()
    with process.sock if process else bind(arguments.host, arguments.port) as sock:
        policy = keys.access_policy(
            sock,
            require_key=arguments.require_key,
            hosts=arguments.allowed_host,
            cors_origins=arguments.cors_origin,
            max_concurrent=arguments.max_concurrent,
            max_concurrent_per_key=arguments.max_concurrent_per_key,
            access_log=arguments.access_log,
            log_text=arguments.log_text,
        )
        tls = keys.tls_context(
            arguments.host,
            arguments.tls,
            arguments.tls_cert,
            arguments.tls_key,
            report if process is None else lambda _: None,
        )
        if process is not None:
            pixels, otlp = arguments.max_image_pixels, arguments.otlp_endpoint
            yield Endpoint(policy, tls, process, names, image_hosts, pixels, otlp)
            return
        if policy.require_key and tls is None:
            report("warning: without TLS, API keys and answers are sent unencrypted; see --tls")
        raise typer.Exit(supervise(sock, report))


@contextmanager
def load_model(
    model: str,
    arguments: LoadArguments,
    plan: Path | None = None,
    *,
    cluster: Cluster | None = None,
    on_message: Callable[[str], None] = report,
    while_loading: Callable[[], None] | None = None,
) -> Iterator[Model]:
    """Load a model with progress bars, and report how it runs.

    Args:
        model: folder or repository.
        arguments: of the command line.
        plan: file with a saved placement.
        cluster, while_loading: see `Model.load`.
        on_message: where to report.
    """
    from .. import deferred_transformers
    from ..core.plan import Plan
    from ..load_options import LoadOptions
    from ..ranks.local_ranks import LocalRanks

    saved_plan = Plan.load(plan) if plan is not None else None
    options = LoadOptions(model, arguments.nodes, plan=saved_plan, **arguments.to_keywords())
    started = LocalRanks.start_early(options) if cluster is None else None
    try:
        # What takes seconds comes only now: the ranks import their libraries meanwhile, and the
        # tokenizer's are imported while they load.
        deferred_transformers.defer()
        from ..api import Model

        with loading_progress() as progress:
            loaded = Model.load(
                options,
                cluster=cluster,
                progress=progress,
                report=report,
                isolate_text=True,
                started=started,
                while_loading=while_loading,
            )
    except BaseException:
        if started is not None:
            started.close(now=True)
        raise
    with loaded:
        drafts = f"drafts: {loaded.drafter}" if loaded.drafter else ""
        for reason in (loaded.ranks.backend_reason, loaded.plan_reason, drafts):
            if reason:
                on_message(reason)
        if arguments.kernels != "mlx":
            on_message(f"computing on {loaded.ranks.ready[0].device}")
        yield loaded
