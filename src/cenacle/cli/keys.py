"""The verbs `cenacle keys add`, `list`, `remove`, and what `serve` is told about who may ask.

Owns: their arguments and what is printed; `cli.py` puts them beside the others.
Invariant: as `cli.py`; a key itself is printed once, when it is made, alone on stdout.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..errors import InputError

if TYPE_CHECKING:
    from ..server.middleware import AccessPolicy

keys_app = typer.Typer(
    help="API keys of this user's servers; needed to listen beyond this machine.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
err = Console(stderr=True, highlight=False, emoji=False)  # :AB: is part of a fingerprint

AsJson = Annotated[bool, typer.Option("--json", help="One JSON object as the last line of stdout.")]
KeyName = Annotated[str, typer.Argument(help="Whose: a person, a program.")]

RequireKey = Annotated[
    bool, typer.Option("--require-key", help="Ask for an API key on loopback too.")
]
Tls = Annotated[str | None, typer.Option(help="self: with a certificate that the server makes.")]
TlsCert = Annotated[Path | None, typer.Option(help="Your own certificate, PEM; needs --tls-key.")]
TlsKey = Annotated[Path | None, typer.Option(help="Its private key, PEM.")]
CorsOrigin = Annotated[
    list[str] | None,
    typer.Option(help="Pages of this origin may ask, such as https://chat.example; repeatable."),
]
AllowedHost = Annotated[
    list[str] | None,
    typer.Option(help="A name that requests to loopback may use, behind a proxy; repeatable."),
]
MaxConcurrent = Annotated[int, typer.Option(min=1, help="Most requests answered at once.")]
MaxConcurrentPerKey = Annotated[int, typer.Option(min=1, help="The same for one key.")]
AccessLog = Annotated[
    bool, typer.Option("--access-log", help="A line per request on stderr, without text.")
]
LogText = Annotated[bool, typer.Option("--log-text", help="Log prompts and answers on stderr.")]


@keys_app.command()
def add(
    name: KeyName,
    tokens_per_day: Annotated[
        int | None, typer.Option(min=1, help="Prompt and generated tokens per UTC day.")
    ] = None,
    streams: Annotated[int | None, typer.Option(min=1, help="Requests at once.")] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it. It cannot be shown again: only its hash is kept.

    Example: [bold]cenacle keys add alice --tokens-per-day 200000[/]
    """
    from ..server.auth import KeyStore

    with contextlib.closing(KeyStore()) as keys:
        secret = keys.add(name, tokens_per_day, streams)
        print(json.dumps({"name": name, "key": secret}) if as_json else secret)
        err.print(
            f"the key of {name}, shown this once; clients send it as their API key "
            f"(kept as a hash in {keys.path})",
            soft_wrap=True,
            markup=False,
        )


@keys_app.command(name="list")
def list_keys(as_json: AsJson = False) -> None:
    """The keys, their limits, and what they have used today.

    Example: [bold]cenacle keys list --json[/]
    """
    from ..server.auth import KeyStore, format_date

    with contextlib.closing(KeyStore()) as keys:
        rows = [
            {
                "name": key.name,
                "created": format_date(key.created),
                "tokens_per_day": key.tokens_per_day,
                "streams": key.streams,
                "used_today": keys.used(key.name),
            }
            for key in keys.all()
        ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("name", "created", "tokens a day", "used today", "streams", box=None)
    for row in rows:
        cells = ("name", "created", "tokens_per_day", "used_today", "streams")
        table.add_row(*("-" if row[c] is None else str(row[c]) for c in cells))
    Console(highlight=False).print(table)


@keys_app.command()
def remove(name: KeyName) -> None:
    """Make a key worthless from the next request on.

    Example: [bold]cenacle keys remove alice[/]
    """
    from ..server.auth import KeyStore

    with contextlib.closing(KeyStore()) as keys:
        keys.remove(name)
    err.print(f"removed {name}", markup=False)


def access_policy(sock: socket.socket, **given: Any) -> AccessPolicy:
    """The policy of a server that listens on `sock`; see `server.guard.Policy.of`.

    Raises:
        InputError: keys are required and there is none.
    """
    from ..server.auth import KeyStore
    from ..server.middleware import AccessPolicy

    hosts, origins = given.pop("hosts") or (), given.pop("cors_origins") or ()
    with contextlib.closing(KeyStore()) as keys:
        return AccessPolicy.for_socket(
            sock, keys, hosts=hosts, cors_origins=tuple(origins), **given
        )


def tls_context(
    host: str, tls: str | None, cert: Path | None, key: Path | None
) -> ssl.SSLContext | None:
    """The TLS that was asked for, or None; says the certificate's fingerprint.

    Raises:
        InputError: options that do not go together, or files that cannot be used.
    """
    from ..paths import make_config_dir
    from ..server import tls as made

    if tls is not None and (tls != "self" or cert is not None or key is not None):
        raise InputError(f"--tls: expected self and no --tls-cert or --tls-key, got {tls!r}", "tls")
    if tls is not None:
        cert, key = made.self_signed(make_config_dir(), host)
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise InputError("--tls-cert and --tls-key: expected both, got one", "tls-cert")
    context = made.server_context(cert, key)
    err.print(
        f"certificate {cert}, SHA-256 fingerprint {made.fingerprint(cert)}",
        soft_wrap=True,
        markup=False,
    )
    return context
