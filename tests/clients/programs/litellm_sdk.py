"""LiteLLM's SDK: three routes to the server."""

import sys
from typing import Literal

import litellm
from pydantic import BaseModel, ConfigDict

url = sys.argv[1]


class Person(BaseModel):
    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
question = [{"role": "user", "content": "play:weather in Paris?"}]
for model, base in (
    ("openai/scripted", f"{url}/v1"),
    ("hosted_vllm/scripted", f"{url}/v1"),
    ("anthropic/scripted", url),
):
    common = {"model": model, "api_base": base, "api_key": "local", "tools": tools}
    first = litellm.completion(messages=question, **common).choices[0].message
    call = first.tool_calls[0]
    assert call.function.name == "get_weather", model
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    messages = [*question, first.model_dump(exclude_none=True), result]
    chunks = list(litellm.completion(messages=messages, stream=True, **common))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == "It is sunny in Paris.", (model, text)
answer = litellm.completion(
    model="openai/scripted",
    api_base=f"{url}/v1",
    api_key="local",
    messages=[{"role": "user", "content": "play:person"}],
    response_format=Person,
)
assert Person.model_validate_json(answer.choices[0].message.content).age == 36
response = litellm.responses(
    model="openai/scripted", api_base=f"{url}/v1", api_key="local", input="play:weather"
)
assert "It is sunny in Paris." in str(response.output)
