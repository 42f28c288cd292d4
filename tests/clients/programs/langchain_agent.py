"""LangChain: an agent with a tool over both APIs, and a structured answer."""

import sys
from typing import Literal

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent
from pydantic import BaseModel, ConfigDict


@tool
def get_weather(city: str) -> str:
    """Weather in a city."""
    return f"sunny in {city}"


class Person(BaseModel):
    """A person."""

    # In an open schema a model that cannot write its script adds fields without end.
    model_config = ConfigDict(extra="forbid")
    name: Literal["Ada"]
    age: Literal[36]


url = sys.argv[1]
chat = ChatOpenAI(base_url=f"{url}/v1", api_key="local", model="scripted")
for model in (
    chat,
    ChatOpenAI(base_url=f"{url}/v1", api_key="local", model="scripted", use_responses_api=True),
    ChatAnthropic(base_url=url, api_key="local", model="scripted", max_tokens=512),
):
    agent = create_react_agent(model, [get_weather])
    messages = agent.invoke({"messages": [HumanMessage("play:weather in Paris?")]})["messages"]
    assert [m.type for m in messages] == ["human", "ai", "tool", "ai"], messages
    assert "It is sunny in Paris." in str(messages[-1].content), messages[-1]
for method, word in (("json_schema", "play:person"), ("function_calling", "play:Person")):
    person = chat.with_structured_output(Person, method=method).invoke(word)
    assert person == Person(name="Ada", age=36), (method, person)
