"""anthropic: messages with tools, streamed, counted; the tool runner; a parsed answer."""

import sys
from typing import Literal

from anthropic import Anthropic, beta_tool
from pydantic import BaseModel, ConfigDict

client = Anthropic(base_url=sys.argv[1], api_key="local")
city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
tools = [{"name": "get_weather", "description": "Weather.", "input_schema": city}]
messages = [{"role": "user", "content": "play:weather in Paris?"}]
common = {"model": "scripted", "max_tokens": 512, "tools": tools}
first = client.messages.create(messages=messages, **common)
assert first.stop_reason == "tool_use", first
call = next(block for block in first.content if block.type == "tool_use")
assert call.input == {"city": "Paris"}
result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
messages += [{"role": "assistant", "content": first.content}, {"role": "user", "content": [result]}]
with client.messages.stream(messages=messages, **common) as stream:
    assert stream.get_final_text() == "It is sunny in Paris."
count = client.messages.count_tokens(model="scripted", messages=messages, tools=tools)
assert count.input_tokens > 50


@beta_tool
def get_weather(city: str) -> str:
    """Weather in a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


runner = client.beta.messages.tool_runner(
    model="scripted", max_tokens=512, tools=[get_weather], messages=messages[:1]
)
last = runner.until_done()
assert last.content[-1].text == "It is sunny in Paris.", last


class Person(BaseModel):
    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


question = [{"role": "user", "content": "play:person"}]
parsed = client.messages.parse(
    model="scripted", max_tokens=512, messages=question, output_format=Person
)
assert parsed.parsed_output == Person(name="Ada", age=36)
assert client.models.list().data
