"""A client asks SmolLM2, cut into experts, in English on two nodes (see `tests/smollm`)."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cenacle.demo import smollm
from support.recording_proxy import recording_proxy
from support.serving import running_server

from .conftest import Client

PACKAGES = Path("~/.cache/cenacle-smollm").expanduser()  # kept from run to run


@pytest.fixture
def english(config_home: Path, tmp_path: Path) -> Iterator[Client]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(smollm, "_install_dir", lambda: PACKAGES)
        model = smollm.prepare_smollm(print)
    with (
        running_server(tmp_path, model=model, nodes=2) as server,
        recording_proxy(server.url) as proxy,
    ):
        yield Client(proxy, tmp_path, tmp_path)


def test_openai_in_english(english: Client, pypi: Callable[..., Path]) -> None:
    english.program(pypi("openai"), "openai_english.py")
    english.check("/v1/chat/completions", at_least=3)
