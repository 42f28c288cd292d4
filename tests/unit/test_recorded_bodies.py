"""Bodies that `make clients` recorded (`CENACLE_RECORD=FOLDER`), the small ones, replayed."""

import json
from pathlib import Path

import pytest

from cenacle.server.api.anthropic import CountTokensAdapter, MessagesAdapter
from cenacle.server.api.openai import ChatCompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import ApiAdapter, ServedModel

SERVED = ServedModel("house", 100_000, 1000, any_name=True)
ADAPTERS: dict[str, type[ApiAdapter]] = {
    "/v1/chat/completions": ChatCompletionsAdapter,
    "/v1/messages": MessagesAdapter,
    "/v1/messages/count_tokens": CountTokensAdapter,
    "/v1/responses": ResponsesAdapter,
}


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parent.glob("wire_forms/*.json")), ids=lambda path: path.stem
)
def test_recorded_bodies_are_accepted(path: Path) -> None:
    records = json.loads(path.read_text())
    assert records
    for record in records:
        request = ADAPTERS[record["path"]]().parse(json.dumps(record["body"]).encode(), SERVED)
        assert len(request.tools) == len(record["body"].get("tools") or ())
