"""instructor: a model by tool, by JSON schema and by JSON, over both APIs."""

import sys
from typing import Literal

import instructor
from anthropic import Anthropic
from openai import OpenAI
from pydantic import BaseModel, ConfigDict


class Person(BaseModel):
    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


url = sys.argv[1]
openai = OpenAI(base_url=f"{url}/v1", api_key="local")
for mode, word in (
    (instructor.Mode.TOOLS, "play:Person"),
    (instructor.Mode.JSON_SCHEMA, "play:person"),
    (instructor.Mode.JSON, "play:person"),
):
    client = instructor.from_openai(openai, mode=mode)
    messages = [{"role": "user", "content": word}]
    person = client.chat.completions.create(
        model="scripted", messages=messages, response_model=Person
    )
    assert person.model_dump() == {"name": "Ada", "age": 36}, mode
client = instructor.from_anthropic(Anthropic(base_url=url, api_key="local"))
messages = [{"role": "user", "content": "play:Person"}]
person = client.messages.create(
    model="scripted", max_tokens=512, messages=messages, response_model=Person
)
assert person.model_dump() == {"name": "Ada", "age": 36}
