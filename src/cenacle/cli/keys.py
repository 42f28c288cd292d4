"""The commands `cenacle keys add`, `list`, `remove`, and a server's access policy and TLS.

Owns: their options and output.
Does not know: how keys are stored and checked (`server/auth.py`, `server/middleware.py`).
Invariant: a key is printed once, when it is created, alone on stdout.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..errors import InputError
from .command import command
from .console import given_width, print_json, report, wide_console
from .help import Group
from .options import JsonOutput

if TYPE_CHECKING:
    from ..server.access_policy import AccessPolicy

app = typer.Typer(
    cls=Group,
    help="Manage the API keys of this user's servers.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
KeyName = Annotated[str, typer.Argument(help="Name of the key's user: a person or a program.")]


@command(app, example="cenacle keys add alice --tokens-per-day 200000")
def add(
    name: KeyName,
    tokens_per_day: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Prompt and generated tokens per UTC day."),
    ] = None,
    max_concurrent: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Answers at once. Default: the server's limit per key."
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="Model that the key may use, by its name in /v1/models; repeatable. Default: all.",
        ),
    ] = None,
    json_output: JsonOutput = False,
) -> None:
    """Create an API key and print it. It cannot be shown again: only its hash is stored."""
    from ..server.auth import KeyStore

    with contextlib.closing(KeyStore()) as keys:
        secret = keys.add(name, tokens_per_day, max_concurrent, model or ())
        if json_output:
            print_json({"name": name, "key": secret})
        else:
            print(secret)
        report(
            f"created the key of {name}; it is shown only now (its hash is stored in {keys.path})"
        )


@command(app, name="list", example="cenacle keys list --json")
def list_keys(json_output: JsonOutput = False) -> None:
    """List the API keys, their limits, and the tokens used today."""
    from ..server.auth import KeyStore, format_date

    with contextlib.closing(KeyStore()) as keys:
        rows: list[dict[str, Any]] = [
            {
                "name": key.name,
                "created": format_date(key.created),
                "tokens_per_day": key.tokens_per_day,
                "max_concurrent": key.max_concurrent,
                "used_today": keys.used_today(key.name),
                "models": list(key.models),
            }
            for key in keys.list_keys()
        ]
    if json_output:
        print_json(rows)
        return
    columns = ("name", "created", "tokens per day", "max concurrent", "used today", "models")
    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut is no name
    for row in rows:
        row["models"] = " ".join(row["models"]) or None
        table.add_row(*("-" if value is None else str(value) for value in row.values()))
    wide_console(given_width()).print(table)


@command(app, example="cenacle keys remove alice")
def remove(name: KeyName) -> None:
    """Delete an API key; servers refuse it from the next request on."""
    from ..server.auth import KeyStore

    with contextlib.closing(KeyStore()) as keys:
        keys.remove(name)
    report(f"removed the key of {name}")


def access_policy(sock: socket.socket, **options: Any) -> AccessPolicy:
    """The policy of a server that listens on `sock`; see `AccessPolicy.for_socket`.

    Raises:
        InputError: keys are required and there is none.
    """
    from ..server.access_policy import AccessPolicy
    from ..server.auth import KeyStore

    hosts, origins = options.pop("hosts") or (), options.pop("cors_origins") or ()
    with contextlib.closing(KeyStore()) as keys:
        return AccessPolicy.for_socket(
            sock, keys, hosts=hosts, cors_origins=tuple(origins), **options
        )


def tls_context(
    host: str,
    tls: str | None,
    cert: Path | None,
    key: Path | None,
    report_fingerprint: Callable[[str], None],
) -> ssl.SSLContext | None:
    """The TLS context by a server's options, or None.

    Args:
        host, tls, cert, key: the options.
        report_fingerprint: told which certificate it is.

    Raises:
        InputError: options that exclude each other, or files that cannot be used.
    """
    if tls is None and cert is None and key is None:
        return None
    from ..paths import make_config_dir
    from ..server.tls import fingerprint, self_signed, server_context

    if tls is not None:
        if tls != "self" or cert is not None or key is not None:
            raise InputError(
                f"--tls: expected self and neither --tls-cert nor --tls-key, got {tls!r}", "tls"
            )
        cert, key = self_signed(make_config_dir(), host)
    if cert is None or key is None:
        raise InputError("--tls-cert and --tls-key: expected both, got one", "tls-cert")
    context = server_context(cert, key)
    report_fingerprint(f"certificate {cert}, SHA-256 fingerprint {fingerprint(cert)}")
    return context
