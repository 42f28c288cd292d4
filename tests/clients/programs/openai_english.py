"""openai with a model that speaks: a streamed answer, its log-probabilities, and an object."""

import json
import math
import sys

from openai import OpenAI

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="local")
question = [{"role": "user", "content": "What is the capital of France?"}]
common = {"model": client.models.list().data[0].id, "messages": question, "temperature": 0}

stream = client.chat.completions.create(
    **common, max_tokens=24, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
assert "Paris" in streamed, streamed
assert chunks[-1].usage.completion_tokens > 3

whole = client.chat.completions.create(**common, max_tokens=24, logprobs=True)
assert whole.choices[0].message.content == streamed
tokens = whole.choices[0].logprobs.content
assert "".join(t.token for t in tokens).startswith(streamed)
assert math.exp(sum(t.logprob for t in tokens) / len(tokens)) > 0.3  # it is sure of its words

schema = {
    "type": "object",
    "properties": {"capital": {"type": "string", "maxLength": 20}},
    "required": ["capital"],
    "additionalProperties": False,
}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
answer = client.chat.completions.create(**common, max_tokens=40, response_format=form)
assert "Paris" in json.loads(answer.choices[0].message.content)["capital"], answer
