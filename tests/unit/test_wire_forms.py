"""Bodies as current clients send them, replayed: each is accepted, and the model sees its tools and
conversation."""

import json
from typing import Any

import pytest

from cenacle.server.api.anthropic import CountTokensAdapter, MessagesAdapter
from cenacle.server.api.openai import ChatCompletionsAdapter, CompletionsAdapter
from cenacle.server.api.openai_responses import ResponsesAdapter
from cenacle.server.api.protocol import MAX_TOOLS, ApiAdapter, GenerationRequest, ServedModel
from cenacle.server.api.validation import RequestError

SERVED = ServedModel("house", 100_000, 1000, any_name=True)
SCHEMA = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "type": "object",
    "properties": {"path": {"type": "string", "description": "File", "format": "path"}},
    "required": ["path"],
    "additionalProperties": False,
}
CALL_ARGUMENTS = '{"path":"a.py"}'

# codex exec, second request of a turn.
CODEX: dict[str, Any] = {
    "model": "house",
    "instructions": "You are Codex, a coding agent.",
    "input": [
        {
            "type": "message",
            "role": "developer",
            "content": [{"type": "input_text", "text": "<permissions instructions>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "<environment_context/>"}],
        },
        {
            "type": "message",
            "role": "user",
            "content": [{"type": "input_text", "text": "Edit a.py"}],
            "internal_chat_message_metadata_passthrough": {"turn_id": "1"},
        },
        {
            "type": "reasoning",
            "summary": [{"type": "summary_text", "text": "Look."}],
            "content": [{"type": "reasoning_text", "text": "Look at it."}],
            "encrypted_content": None,
        },
        {"type": "additional_tools", "tools": []},
        {
            "type": "message",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "I look."}],
            "phase": "commentary",
        },
        {
            "type": "function_call",
            "name": "shell_command",
            "arguments": '{"command":"ls"}',
            "call_id": "c1",
        },
        {"type": "function_call_output", "call_id": "c1", "output": "a.py"},
        {
            "type": "custom_tool_call",
            "status": "completed",
            "call_id": "c2",
            "name": "apply_patch",
            "input": "*** Begin Patch",
        },
        {"type": "custom_tool_call_output", "call_id": "c2", "name": "apply_patch", "output": "ok"},
        {"type": "web_search_call", "status": "completed", "action": {"type": "search"}},
        {"type": "tool_search_call", "call_id": "c3", "execution": "client", "arguments": {}},
        {"type": "tool_search_output", "call_id": "c3", "execution": "client", "tools": []},
        {"type": "compaction", "encrypted_content": "x"},
        {"type": "ghost_snapshot", "ghost_commit": {"id": "x"}},
    ],
    "tools": [
        {
            "type": "function",
            "name": "shell_command",
            "description": "Run",
            "strict": False,
            "defer_loading": False,
            "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
            "output_schema": {"type": "object"},
        },
        {
            "type": "custom",
            "name": "apply_patch",
            "description": "Edit files",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"},
        },
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
        {"type": "tool_search", "execution": "client", "description": "", "parameters": {}},
        {"type": "namespace", "name": "mcp__x", "description": "", "tools": []},
        {"type": "image_generation", "output_format": "png"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
    "reasoning": {"effort": "medium", "summary": "auto", "context": "current_turn"},
    "store": False,
    "stream": True,
    "stream_options": {"reasoning_summary_delivery": "sequential_cutoff"},
    "include": ["reasoning.encrypted_content"],
    "service_tier": "priority",
    "prompt_cache_key": "0199",
    "text": {"verbosity": "low"},
    "client_metadata": {"x-codex-installation-id": "1"},
}

# claude -p, with tools loaded later, context management and a past turn of a web search.
CLAUDE_CODE: dict[str, Any] = {
    "model": "house",
    "max_tokens": 32000,
    "messages": [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "<system-reminder/>"},
                {
                    "type": "text",
                    "text": "Edit a.py",
                    "cache_control": {"type": "ephemeral", "ttl": "1h", "scope": "global"},
                },
            ],
        },
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {}},
                {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
                {"type": "text", "text": "I look.", "citations": None},
                {
                    "type": "tool_use",
                    "id": "toolu_1",
                    "name": "Read",
                    "input": {"path": "a.py"},
                    "caller": {"type": "direct"},
                },
                {"type": "tool_use", "id": "toolu_2", "name": "ToolSearch", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_1",
                    "content": [{"type": "text", "text": "x = 1"}],
                    "is_error": False,
                    "cache_control": {"type": "ephemeral"},
                },
                {
                    "type": "tool_result",
                    "tool_use_id": "toolu_2",
                    "content": [{"type": "tool_reference", "tool_name": "Read"}],
                },
            ],
        },
        {"role": "system", "content": "The user's editor is open."},
    ],
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2.1; cch=1;"},
        {
            "type": "text",
            "text": "You are Claude Code.",
            "cache_control": {"type": "ephemeral", "scope": "global"},
        },
    ],
    "tools": [
        {
            "name": "Read",
            "description": "Read a file",
            "input_schema": SCHEMA,
            "eager_input_streaming": True,
            "defer_loading": True,
            "strict": True,
            "input_examples": [{"path": "a.py"}],
            "allowed_callers": ["direct"],
            "cache_control": {"type": "ephemeral"},
        },
        {"type": "web_search_20260209", "name": "web_search", "max_uses": 8},
        {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
        {"type": "code_execution_20250825", "name": "code_execution"},
        {"type": "mcp_toolset", "mcp_server_name": "x"},
        {"type": "memory_20250818", "name": "memory"},
    ],
    "metadata": {"user_id": "{}"},
    "thinking": {"type": "adaptive", "display": "summarized"},
    "context_management": {
        "edits": [{"type": "clear_thinking_20251015", "keep": "all"}],
    },
    "output_config": {"effort": "high", "task_budget": {"type": "tokens", "total": 100000}},
    "cache_control": {"type": "ephemeral"},
    "speed": "standard",
    "service_tier": "auto",
    "inference_geo": "not_available",
    "container": None,
    "mcp_servers": [],
    "betas": ["context-management-2025-06-27"],
    "diagnostics": {"previous_message_id": None},
    "fallbacks": [],
    "temperature": 1,
    "stream": True,
}

CHAT_TOOL = {
    "type": "function",
    "function": {"name": "read", "description": "", "parameters": SCHEMA, "strict": True},
}
CHAT_CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "read", "arguments": CALL_ARGUMENTS},
}
CHAT_HISTORY: list[dict[str, Any]] = [
    {"role": "system", "content": [{"type": "text", "text": "Brief.", "cache_control": {}}]},
    {"role": "user", "name": "ann", "content": "Read a.py"},
    {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": [
            {
                "id": "c1",
                "index": 0,
                "type": "function",
                "function": {"name": "read", "arguments": CALL_ARGUMENTS},
                "extra_content": {"google": {"thought_signature": "x"}},
            }
        ],
    },
    {
        "role": "tool",
        "tool_call_id": "c1",
        "name": "read",
        "content": [{"type": "text", "text": "x"}],
    },
]

# By client: the API, and the body.
WIRE_FORMS: dict[str, tuple[type[ApiAdapter], dict[str, Any]]] = {
    "codex": (ResponsesAdapter, CODEX),
    "claude_code": (MessagesAdapter, CLAUDE_CODE),
    "claude_code_count": (
        CountTokensAdapter,
        {name: CLAUDE_CODE[name] for name in ("model", "messages", "system", "tools", "thinking")},
    ),
    "claude_code_title": (
        MessagesAdapter,
        {
            "model": "house",
            "max_tokens": 512,
            "messages": [{"role": "user", "content": "Name this session"}],
            "output_config": {
                "format": {
                    "type": "json_schema",
                    "schema": {
                        "type": "object",
                        "properties": {"title": {"type": "string"}},
                        "required": ["title"],
                        "additionalProperties": False,
                    },
                }
            },
            "tools": [],
            "thinking": {"type": "disabled"},
            "temperature": 1,
            "stream": True,
        },
    ),
    "ai_sdk_responses": (
        ResponsesAdapter,
        {
            "model": "house",
            "input": [
                {"role": "developer", "content": "Brief."},
                {"role": "user", "content": [{"type": "input_text", "text": "Read a.py"}]},
                {
                    "type": "function_call",
                    "call_id": "c",
                    "name": "read",
                    "arguments": CALL_ARGUMENTS,
                    "id": "fc_1",
                },
                {
                    "type": "function_call_output",
                    "call_id": "c",
                    "output": [{"type": "input_text", "text": "x"}],
                },
            ],
            "tools": [
                {"type": "function", "name": "read", "parameters": SCHEMA, "strict": True},
                {"type": "web_search_preview", "search_context_size": "low"},
                {"type": "code_interpreter", "container": {"type": "auto"}},
                {"type": "mcp", "server_label": "x", "server_url": "http://x"},
            ],
            "tool_choice": "auto",
            "include": ["web_search_call.action.sources", "code_interpreter_call.outputs"],
            "reasoning": {"summary": "detailed"},
            "max_tool_calls": 5,
            "truncation": "auto",
            "top_logprobs": 0,
            "service_tier": "flex",
            "prompt_cache_retention": "24h",
            "safety_identifier": "x",
            "metadata": {"a": "b"},
            "store": True,
        },
    ),
    "ai_sdk_anthropic": (
        MessagesAdapter,
        {
            "model": "house",
            "max_tokens": 4096,
            "temperature": 0.5,
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Read", "citations": None}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "Ok.", "citations": None},
                        {"type": "tool_use", "id": "t", "name": "read", "input": {"path": "a"}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t", "content": '{"a":1}'},
                    ],
                },
            ],
            "tools": [{"name": "read", "input_schema": SCHEMA, "description": ""}],
            "tool_choice": {"type": "auto", "disable_parallel_tool_use": None},
            "stream": True,
        },
    ),
    "anthropic_tool_runner": (
        MessagesAdapter,
        {
            "model": "house",
            "max_tokens": 1024,
            "messages": [
                {"role": "user", "content": "Read"},
                {
                    "role": "assistant",
                    "content": [
                        {"citations": None, "text": "Ok.", "type": "text", "parsed_output": None},
                        {
                            "id": "t",
                            "caller": None,
                            "input": {"path": "a"},
                            "name": "read",
                            "type": "tool_use",
                        },
                    ],
                },
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}],
                },
            ],
            "tools": [
                {
                    "name": "read",
                    "input_schema": {
                        "additionalProperties": False,
                        "properties": {"path": {"title": "Path", "type": "string"}},
                        "required": ["path"],
                        "type": "object",
                    },
                    "description": "Read",
                }
            ],
        },
    ),
    "openai_agents": (
        ResponsesAdapter,
        {
            "model": "house",
            "include": [],
            "input": [
                {"content": "Read a.py", "role": "user"},
                {
                    "id": "msg_1",
                    "content": [
                        {"annotations": [], "text": "Ok.", "type": "output_text", "logprobs": []}
                    ],
                    "role": "assistant",
                    "status": "completed",
                    "type": "message",
                },
                {
                    "arguments": CALL_ARGUMENTS,
                    "call_id": "c",
                    "name": "read",
                    "type": "function_call",
                    "id": "fc_1",
                    "status": "completed",
                },
                {"call_id": "c", "output": "x", "type": "function_call_output"},
            ],
            "instructions": "Brief.",
            "tools": [
                {"name": "read", "parameters": SCHEMA, "strict": True, "type": "function"},
            ],
            "text": {
                "format": {
                    "type": "json_schema",
                    "name": "final_output",
                    "schema": SCHEMA,
                    "strict": True,
                }
            },
            "stream": False,
        },
    ),
    "instructor": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "Read"}],
            "tools": [CHAT_TOOL],
            "tool_choice": {"type": "function", "function": {"name": "read"}},
        },
    ),
    "pydantic_ai": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [*CHAT_HISTORY, {"role": "user", "content": "And?"}],
            "tools": [CHAT_TOOL],
            "tool_choice": "required",
            "parallel_tool_calls": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "langchain": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": CHAT_HISTORY,
            "max_completion_tokens": 50,
            "max_tokens": 100,
            "n": 1,
            "temperature": 0.1,
            "tools": [CHAT_TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True, "include_obfuscation": False},
        },
    ),
    "litellm": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "Hi", "provider_specific_fields": {}}],
            "reasoning_effort": "low",
            "metadata": {"a": "b"},
            "store": True,
            "verbosity": "low",
            "modalities": ["text"],
            "prediction": {"type": "content", "content": "x"},
            "web_search_options": {"search_context_size": "low"},
            "service_tier": "auto",
            "logprobs": False,
            "top_logprobs": 0,
            "top_p": 0,
            "top_k": -1,
            "stop": [str(n) for n in range(16)],
            "functions": [],
            "function_call": "auto",
            "extra_headers": {},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        },
    ),
    "continue": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "", "tool_calls": []},
                {"role": "user", "content": "Go"},
            ],
            "max_tokens": 4096,
            "stream": True,
            "tools": [],
            "parallel_tool_calls": False,
        },
    ),
    "opencode": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "max_tokens": 32000,
            "messages": [
                {"role": "system", "content": "You are opencode."},
                {"role": "user", "content": "Edit a.py"},
                {
                    "role": "assistant",
                    "content": "",
                    "reasoning_content": "Look.",
                    "tool_calls": [CHAT_CALL],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "x"},
            ],
            "tools": [CHAT_TOOL],
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ),
    "qwen_code": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [
                {"role": "system", "content": "You are Qwen Code."},
                {"role": "user", "content": [{"type": "text", "text": "Setting up."}]},
                {"role": "assistant", "content": "Got it."},
                {"role": "user", "content": [{"type": "text", "text": "Edit a.py"}]},
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [CHAT_CALL],
                    "reasoning_content": "Look.",
                },
                {
                    "role": "tool",
                    "tool_call_id": "c1",
                    "content": [{"type": "text", "text": "x"}],
                },
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "tools": [CHAT_TOOL],
            "max_tokens": 8000,
        },
    ),
    "continue_history": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [
                {"role": "system", "content": "You are an agent in the Continue CLI."},
                {"role": "user", "content": "Edit a.py"},
                {"role": "assistant", "content": "", "tool_calls": [CHAT_CALL]},
                {"role": "tool", "content": "x", "tool_call_id": "c1"},
            ],
            "stream": True,
            "tools": [CHAT_TOOL],
            "stream_options": {"include_usage": True},
        },
    ),
    "aider": (
        ChatCompletionsAdapter,
        {
            "messages": [
                {"role": "system", "content": "Act as an expert software developer."},
                {"role": "user", "content": "Change the greeting"},
                {"role": "assistant", "content": "Ok, I will."},
                {"role": "user", "content": "Edit a.py"},
            ],
            "model": "house",
            "temperature": 0,
        },
    ),
    "smolagents": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [
                {"role": "system", "content": [{"type": "text", "text": "You are an expert."}]},
                {"role": "user", "content": [{"type": "text", "text": "New task:"}]},
            ],
            "stop": ["Observation:", "Calling tools:", "</code>"],
        },
    ),
    "llm": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "stream": True,
            "messages": [{"role": "user", "content": "Hi"}],
            "stream_options": {"include_usage": True},
        },
    ),
    "promptfoo": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "Hi"}],
            "max_tokens": 1024,
            "temperature": 0,
        },
    ),
    "llamaindex": (
        ChatCompletionsAdapter,
        {
            "messages": [{"role": "user", "content": "Hi"}],
            "model": "house",
            "parallel_tool_calls": False,
            "stream": False,
            "temperature": 0.1,
            "tool_choice": "required",
            "tools": [CHAT_TOOL],
        },
    ),
    "openrouter_form": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [
                {"role": "user", "content": "Hi"},
                {
                    "role": "assistant",
                    "content": "Ho",
                    "reasoning": "Hm",
                    "reasoning_details": [{"type": "reasoning.text", "text": "Hm"}],
                },
                {"role": "user", "content": "Go"},
            ],
            "reasoning": {"effort": "high", "exclude": False},
            "usage": {"include": True},
            "provider": {"order": []},
            "transforms": [],
            "models": ["house"],
        },
    ),
    "lm_eval": (
        CompletionsAdapter,
        {
            "model": "house",
            "prompt": [[1, 2, 3]],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": 1,
            "seed": 1234,
            "echo": True,
        },
    ),
    "vllm_bench": (
        CompletionsAdapter,
        {
            "model": "house",
            "prompt": "x",
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_tokens": 16,
            "logprobs": None,
            "stream": True,
            "ignore_eos": True,
            "min_tokens": 16,
            "best_of": 1,
            "use_beam_search": False,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        },
    ),
    "vllm_bench_chat": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}],
            "max_completion_tokens": 16,
            "repetition_penalty": 1.0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        },
    ),
    "guidellm": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "max_completion_tokens": 16,
            "ignore_eos": True,
            "messages": [{"role": "user", "content": [{"type": "text", "text": "1 0 m0 Finish"}]}],
        },
    ),
    "genai_perf": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "ill go Exeunt"}],
            "stream": True,
            "max_tokens": 16,
            "ignore_eos": True,
        },
    ),
    "llama_cpp": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "Hi"}],
            "cache_prompt": True,
            "timings_per_token": True,
            "return_progress": True,
            "reasoning_format": "auto",
            "samplers": "edskypmxt",
            "dynatemp_range": 0,
            "dynatemp_exponent": 1,
            "xtc_probability": 0,
            "xtc_threshold": 0.1,
            "typical_p": 1,
            "typ_p": 1,
            "repeat_last_n": 64,
            "repeat_penalty": 1,
            "dry_multiplier": 0,
            "dry_base": 1.75,
            "dry_allowed_length": 2,
            "dry_penalty_last_n": -1,
            "max_tokens": -1,
            "id_slot": -1,
            "n_keep": 0,
            "mirostat": 0,
            "mirostat_tau": 5,
            "n_probs": 0,
            "min_keep": 0,
            "lora": [],
            "post_sampling_probs": False,
            "backend_sampling": False,
        },
    ),
    "vllm_extensions": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "Hi"}],
            "add_generation_prompt": True,
            "continue_final_message": False,
            "add_special_tokens": False,
            "skip_special_tokens": True,
            "spaces_between_special_tokens": True,
            "include_stop_str_in_output": False,
            "stop_token_ids": [],
            "bad_words": [],
            "length_penalty": 1.0,
            "use_beam_search": False,
            "truncate_prompt_tokens": None,
            "allowed_token_ids": None,
            "return_tokens_as_token_ids": False,
            "return_token_ids": False,
            "priority": 0,
            "request_id": "x",
            "cache_salt": "x",
            "kv_transfer_params": None,
            "vllm_xargs": {},
            "mm_processor_kwargs": None,
            "documents": [],
            "logits_processors": [],
            "include_reasoning": True,
            "repetition_detection": None,
            "thinking_token_budget": 100,
            "chat_template_kwargs": {"enable_thinking": False},
        },
    ),
    "sglang_extensions": (
        ChatCompletionsAdapter,
        {
            "model": "house",
            "messages": [{"role": "user", "content": "Hi"}],
            "no_stop_trim": False,
            "stop_regex": None,
            "ebnf": None,
            "regex": None,
            "separate_reasoning": True,
            "stream_reasoning": True,
            "return_hidden_states": False,
            "return_routed_experts": False,
            "return_cached_tokens_details": False,
            "rid": "x",
            "lora_path": None,
            "session_params": None,
            "custom_params": None,
            "bootstrap_host": None,
            "data_parallel_rank": 0,
            "extra_key": None,
            "min_tokens": 0,
            "n": 1,
        },
    ),
}


def replay(client: str) -> GenerationRequest:
    api, body = WIRE_FORMS[client]
    return api().parse(json.dumps(body).encode(), SERVED)


@pytest.mark.parametrize("client", WIRE_FORMS)
def test_bodies_of_clients_are_accepted(client: str) -> None:
    request = replay(client)
    assert request.prompts[0]


def test_codex_tools_and_history_reach_the_model() -> None:
    request = replay("codex")
    assert [tool.name for tool in request.tools] == ["shell_command", "apply_patch"]
    assert [tool.freeform for tool in request.tools] == [False, True]
    assert "start: X" in request.tools[1].description
    roles = [message["role"] for message in request.prompts[0]]  # type: ignore[index]
    assert roles == [
        "system",
        "system",
        "user",
        "user",
        "assistant",
        "tool",
        "assistant",
        "tool",
    ]
    assert request.reasoning_effort == "medium"
    assert "client_metadata: ignored" in request.warnings


@pytest.mark.parametrize("client", ["claude_code", "claude_code_count"])
def test_claude_code_tools_and_history_reach_the_model(client: str) -> None:
    request = replay(client)
    assert [tool.name for tool in request.tools] == ["Read"]
    messages: Any = request.prompts[0]
    assert [m["role"] for m in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "system",
    ]
    assert messages[2]["content"] == "I look."
    assert messages[2]["reasoning_content"] == "Look."
    assert [call["function"]["name"] for call in messages[2]["tool_calls"]] == [
        "Read",
        "ToolSearch",
    ]
    assert "Read" in messages[4]["content"]


def test_tools_in_the_conversation_are_offered_once() -> None:
    run = {"type": "function", "name": "run", "parameters": {"type": "object"}}
    patch = {"type": "custom", "name": "apply_patch", "description": "Edit files"}
    item = {
        "type": "additional_tools",
        "role": "developer",
        "tools": [run, patch, {"type": "web_search"}],
    }
    message = {"type": "message", "role": "user", "content": "Go"}
    body = {"tools": [run], "input": [item, message, item], "tool_choice": "required"}
    request = ResponsesAdapter().parse(json.dumps(body).encode(), SERVED)
    assert [(tool.name, tool.freeform) for tool in request.tools] == [
        ("run", False),
        ("apply_patch", True),
    ]
    assert request.prompts == (({"role": "user", "content": "Go"},),)


def test_too_many_tools_in_the_conversation_are_refused() -> None:
    items = [
        {"type": "additional_tools", "tools": [{"type": "function", "name": f"f{n}"}]}
        for n in range(MAX_TOOLS + 1)
    ]
    body = {"input": [*items, {"role": "user", "content": "Go"}]}
    with pytest.raises(RequestError, match="tools: expected at most"):
        ResponsesAdapter().parse(json.dumps(body).encode(), SERVED)


@pytest.mark.parametrize("client", ["opencode", "qwen_code", "continue_history"])
def test_chat_agents_tools_and_calls_reach_the_model(client: str) -> None:
    request = replay(client)
    assert [tool.name for tool in request.tools] == ["read"]
    *_, call, result = request.prompts[0]  # type: ignore[misc]
    (made,) = call["tool_calls"]
    assert (made["function"]["name"], result["role"]) == ("read", "tool")
    assert "x" in json.dumps(result["content"])


def test_messages_of_other_agents_are_read() -> None:
    message = {
        "type": "agent_message",
        "author": "/agents",
        "recipient": "/agents/a",
        "content": [
            {"type": "input_text", "text": "Look at b.py"},
            {"type": "encrypted_content", "encrypted_content": "x"},
        ],
    }
    request = ResponsesAdapter().parse(json.dumps({"input": [message]}).encode(), SERVED)
    expected = {"role": "user", "content": "Message from /agents:\nLook at b.py"}
    assert request.prompts == ((expected,),)


def test_tools_without_a_type_are_functions() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    body = {"messages": messages, "tools": [{"function": {"name": "f"}}]}
    request = ChatCompletionsAdapter().parse(json.dumps(body).encode(), SERVED)
    assert [tool.name for tool in request.tools] == ["f"]


def test_a_format_without_a_schema_is_any_json() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True}}
    body = {"messages": messages, "response_format": form}
    request = ChatCompletionsAdapter().parse(json.dumps(body).encode(), SERVED)
    assert request.grammar is not None


def test_samplers_in_another_order_are_refused() -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}], "samplers": "kpt"}
    with pytest.raises(RequestError, match="samplers"):
        ChatCompletionsAdapter().parse(json.dumps(body).encode(), SERVED)
