"""openai: chat with tools, a parsed answer, Responses with a tool loop and an earlier response."""

import json
import sys
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, ConfigDict

client = OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="local")
city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
function = {"name": "get_weather", "description": "Weather.", "parameters": city}


class Person(BaseModel):
    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


messages = [{"role": "user", "content": "play:weather in Paris?"}]
tools = [{"type": "function", "function": function}]
first = client.chat.completions.create(model="scripted", messages=messages, tools=tools)
call = first.choices[0].message.tool_calls[0]
assert json.loads(call.function.arguments) == {"city": "Paris"}, call
messages += [
    first.choices[0].message.model_dump(exclude_none=True),
    {"role": "tool", "tool_call_id": call.id, "content": "sunny"},
]
with client.chat.completions.stream(model="scripted", messages=messages, tools=tools) as stream:
    answer = stream.get_final_completion()
assert answer.choices[0].message.content == "It is sunny in Paris."

question = [{"role": "user", "content": "play:person"}]
parsed = client.chat.completions.parse(model="scripted", messages=question, response_format=Person)
assert parsed.choices[0].message.parsed == Person(name="Ada", age=36)

tools = [{"type": "function", **function}]
first = client.responses.create(model="scripted", input="play:weather in Paris?", tools=tools)
calls = [item for item in first.output if item.type == "function_call"]
result = {"type": "function_call_output", "call_id": calls[0].call_id, "output": "sunny"}
second = client.responses.create(
    model="scripted", previous_response_id=first.id, input=[result], tools=tools
)
assert second.output_text == "It is sunny in Paris."
structured = client.responses.parse(model="scripted", input="play:person", text_format=Person)
assert structured.output_parsed == Person(name="Ada", age=36)
assert any(model.id for model in client.models.list())
