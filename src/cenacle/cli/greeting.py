"""What `cenacle serve` and `up` say on a terminal once they serve.

Owns: the lines.
Does not know: how speed is predicted (`server/expected_speed.py`), the terminal.
Invariant: a line is at most 78 columns wide, but for addresses and sentences of other modules.
"""

from __future__ import annotations

import shutil
import ssl
import textwrap
from typing import TYPE_CHECKING

from ..server.expected_speed import SpeedPrediction, predict_speed

if TYPE_CHECKING:
    from ..api import Model

LABEL_WIDTH = 11


def compose_greeting(
    model: Model, url: str, needs_key: bool, tls: ssl.SSLContext | None
) -> list[str]:
    """The lines: page, key, how to point clients here, what to expect, how to watch.

    Args:
        model: loaded.
        url: of the server.
        needs_key: whether every request needs an API key.
        tls: None: plain HTTP.
    """
    key = "KEY" if needs_key else "none"
    keys = "every request needs one; `cenacle keys add NAME` makes another"
    prediction = predict_speed(model.plan, model.config, model.name)
    if isinstance(prediction, SpeedPrediction):
        speed = f"about {prediction.tok_per_s:.3g} tokens/s for one request ({prediction.basis})"
    else:
        speed = f"not predicted: {prediction}"
    length = model.spec.context_length
    rows = {
        "page": f"{url}/",
        "key": keys if needs_key else "none needed from this machine",
        "clients": f"OPENAI_BASE_URL={url}/v1 OPENAI_API_KEY={key}",
        "": f"ANTHROPIC_BASE_URL={url} ANTHROPIC_API_KEY={key}",
        "speed": speed,
        "context": f"{length:,} tokens" if length else "of unknown length",
        "watch": f"cenacle top --url {url}" + (" --key KEY" if needs_key else ""),
    }
    if tls is not None:
        rows["tls"] = "clients must trust the certificate: see docs/security.md"
    return [line for label, text in rows.items() for line in _wrap(label, text)]


def _wrap(label: str, text: str) -> list[str]:
    """A labeled text in the terminal's width; addresses are never broken."""
    width = min(78, shutil.get_terminal_size().columns)
    wrapper = textwrap.TextWrapper(
        width=max(width, LABEL_WIDTH + 20),
        initial_indent=f"  {label:<{LABEL_WIDTH - 2}}",
        subsequent_indent=" " * LABEL_WIDTH,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return wrapper.wrap(text)
