"""LangChain: a picture by each API, in its own form and in OpenAI's; prints the answers."""

import base64
import json
import sys
from pathlib import Path

from langchain_anthropic import ChatAnthropic
from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

url, picture, tokens = sys.argv[1], sys.argv[2], int(sys.argv[3])
data = base64.b64encode(Path(picture).read_bytes()).decode()
own_form = {"type": "image", "source_type": "base64", "mime_type": "image/png", "data": data}
openai_form = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
options = {"api_key": "local", "model": "seer", "temperature": 0, "max_tokens": tokens}
answers = []
for model in (
    ChatOpenAI(base_url=f"{url}/v1", **options),
    ChatOpenAI(base_url=f"{url}/v1", use_responses_api=True, **options),
    ChatAnthropic(base_url=url, **options),
):
    for image in (own_form, openai_form):
        parts = [{"type": "text", "text": "Look "}, image, {"type": "text", "text": " well?"}]
        content = model.invoke([HumanMessage(parts)]).content
        if not isinstance(content, str):
            content = "".join(part.get("text", "") for part in content)
        answers.append(content)
print(json.dumps(answers))
