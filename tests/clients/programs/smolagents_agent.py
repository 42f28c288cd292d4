"""smolagents: an agent that writes code which calls a tool."""

import sys

from smolagents import CodeAgent, OpenAIServerModel, tool


@tool
def get_weather(city: str) -> str:
    """Weather in a city.

    Args:
        city: its name.
    """
    return f"sunny in {city}"


model = OpenAIServerModel("scripted", api_base=f"{sys.argv[1]}/v1", api_key="local")
agent = CodeAgent(tools=[get_weather], model=model, max_steps=2)
assert agent.run("play:code") == "sunny in Paris"
