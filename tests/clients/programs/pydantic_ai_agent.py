"""pydantic-ai: an agent with a tool over three APIs; output by tool and by schema."""

import sys
from typing import Literal

from pydantic import BaseModel, ConfigDict
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"sunny in {city}"


url = sys.argv[1]
openai = OpenAIProvider(base_url=f"{url}/v1", api_key="local")
anthropic = AnthropicProvider(base_url=url, api_key="local")
for model in (
    OpenAIChatModel("scripted", provider=openai),
    OpenAIResponsesModel("scripted", provider=openai),
    AnthropicModel("scripted", provider=anthropic),
):
    agent = Agent(model, tools=[get_weather])
    assert agent.run_sync("play:weather in Paris?").output == "It is sunny in Paris.", model
    person = Agent(model, output_type=Person).run_sync("play:final_result").output
    assert person == Person(name="Ada", age=36), model
chat = OpenAIChatModel("scripted", provider=openai)
agent = Agent(chat, tools=[get_weather], output_type=NativeOutput(Person))
assert agent.run_sync("play:person").output == Person(name="Ada", age=36)
