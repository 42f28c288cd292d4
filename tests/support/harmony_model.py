"""What makes a tokenizer one of gpt-oss's: marks, and a template in the form of its own."""

MARKS = tuple(
    f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "return", "call")
)
# In the form of gpt-oss's: the first message may be the system's, one call in a message.
TEMPLATE = """\
<|start|>system<|message|>Reasoning: {{ reasoning_effort or "medium" }}<|end|>
{%- if messages[0].role == "system" %}{% set rest = messages[1:] -%}
<|start|>developer<|message|>{{ messages[0].content }}{% if tools %}{{ tools }}{% endif %}<|end|>
{%- else %}{% set rest = messages %}{% endif %}
{%- set last = namespace(name=none) %}
{%- for message in rest %}
{%- if message.role == "assistant" and "tool_calls" in message %}
{%- if message.content and message.thinking %}{{ raise_exception("both") }}{% endif %}
{%- if message.thinking -%}
<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}<|end|>{% endif %}
{%- set call = message.tool_calls[0].function %}{% set last.name = call.name -%}
<|start|>assistant to=functions.{{ call.name }}<|channel|>commentary json<|message|>
{{- call.arguments | tojson }}<|call|>
{%- elif message.role == "assistant" -%}
<|start|>assistant<|channel|>final<|message|>{{ message.content }}<|end|>
{%- elif message.role == "tool" -%}
{% if last.name is none %}{{ raise_exception("no call") }}{% endif -%}
<|start|>functions.{{ last.name }} to=assistant<|channel|>commentary<|message|>
{{- message.content | tojson }}<|end|>
{%- elif message.role == "user" -%}
<|start|>user<|message|>{{ message.content }}<|end|>
{%- endif %}{% endfor %}
{%- if add_generation_prompt -%}<|start|>assistant{% endif %}"""
