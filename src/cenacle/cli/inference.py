"""The commands that run a model: `cenacle generate`, `chat`, `serve`.

Owns: their options and output; loading a model and opening a server for them and for `up`.
Does not know: how a model is loaded (`api`), how requests are answered (`server`).
Next: `cluster.py` has `up`, which serves a model from several machines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import InputError
from ..images.fetch import AllowedHosts
from . import keys
from .command import command
from .console import loading_progress, print_json, read_stdin, report
from .early_checks import check_model
from .options import (
    MODEL_HELP,
    JsonOutput,
    LoadArguments,
    ModelName,
    PlanFile,
    SamplingArguments,
    ServerArguments,
    ServingArguments,
)

if TYPE_CHECKING:
    import ssl

    from ..api import Model
    from ..cluster.formation import Cluster
    from ..server.access_policy import AccessPolicy
    from ..server.supervisor import SupervisedProcess

app = typer.Typer()
PANEL = "Run a model"
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
    check_model(model)
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
        report(
            f"{completion.prompt_tokens} prompt tokens, time to first token "
            f"{completion.first_token_s:.2f} s; {len(completion.tokens)} tokens generated, "
            f"{completion.tok_per_s:.1f} tok/s on {nodes}"
        )


@command(app, example="cenacle chat -m org/model -n 2", panel=PANEL)
def chat(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help=f"{MODEL_HELP} With --url: its name there."
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
        typer.Option(metavar="FILE", help="Picture to show with the first question; repeatable."),
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
            "--model: expected a folder or a repository, got none; or give a server with --url",
            "model",
        )
    check_model(model)
    with load_model(model, load, plan) as loaded, isolate_text(loaded):
        ChatSession(LocalChat(loaded), settings, system or "", images=images).run(history_path)


@command(app, example="cenacle serve -m DIR -n 2 --port 8080", panel=PANEL)
def serve(
    model: ModelName,
    *,
    server: ServerArguments,
    load: ServingArguments,
    plan: PlanFile = None,
) -> None:
    """Serve a model through HTTP: the APIs of OpenAI (chat completions, completions, responses) and
    Anthropic (messages), tokenization as in vLLM and llama.cpp, metrics, and a web page.
    """
    check_model(model)
    # A port in use is found before the model is loaded.
    with open_server(server) as endpoint:
        with load_model(model, load, plan) as loaded:
            endpoint.serve(loaded, lambda url: report(f"serving {loaded.name} at {url}"))


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

    def serve(self, model: Model, on_started: Callable[[str], None]) -> None:
        """Answer requests until the program is ended; `on_started` gets the URL."""
        from ..server.http_server import serve
        from ..server.limits import Limits

        def report_started(url: str) -> None:
            self.process.report_ready()
            on_started(url)

        serve(
            model,
            self.process.sock,
            on_started=report_started,
            limits=Limits(max_image_pixels=self.max_image_pixels, image_hosts=self.image_hosts),
            policy=self.policy,
            tls=self.tls,
            restarts=self.process.restarts,
            names=self.model_names,
        )


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
            yield Endpoint(policy, tls, process, names, image_hosts, arguments.max_image_pixels)
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
) -> Iterator[Model]:
    """Load a model with progress bars, and report how it runs.

    Args:
        model: folder or repository.
        arguments: of the command line.
        plan: file with a saved placement.
        cluster: see `Model.load`.
        on_message: where to report.
    """
    from ..api import Model
    from ..core.plan import Plan
    from ..runtime import LoadOptions

    saved_plan = Plan.load(plan) if plan is not None else None
    options = LoadOptions(model, arguments.nodes, plan=saved_plan, **arguments.to_keywords())
    with loading_progress() as progress:
        loaded = Model.load(
            options, progress=progress, cluster=cluster, report=report, isolate_text=True
        )
    with loaded:
        for reason in (loaded.ranks.backend_reason, loaded.plan_reason):
            if reason:
                on_message(reason)
        if arguments.kernels != "mlx":
            on_message(f"computing on {loaded.ranks.ready[0].device}")
        yield loaded
