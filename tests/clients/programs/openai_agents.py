"""openai-agents: a tool over both APIs; a tool and an output type together."""

import sys
from typing import Literal

from agents import (
    Agent,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, ConfigDict


class Person(BaseModel):
    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


@function_tool
def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"sunny in {city}"


set_tracing_disabled(True)
client = AsyncOpenAI(base_url=f"{sys.argv[1]}/v1", api_key="local")
for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
    model = kind("scripted", client)
    agent = Agent("weather", instructions="Use tools.", tools=[get_weather], model=model)
    result = Runner.run_sync(agent, "play:weather in Paris?")
    assert result.final_output == "It is sunny in Paris.", kind
    agent = Agent("person", tools=[get_weather], output_type=Person, model=model)
    assert Runner.run_sync(agent, "play:person").final_output == Person(name="Ada", age=36), kind
