"""Parameters that mean the same in every API that generates, and those that none supports.

Owns: sampling, constraints and reasoning as OpenAI's API, vLLM, SGLang, llama.cpp, Ollama and
hosted services name them; the table of what would change the answer and is refused.
Does not know: messages, tools, the shapes of responses.
Invariant: what a request model declares it obeys; the rest of `_UNSUPPORTED` it refuses by name,
unless the value requests nothing.
Next: `openai.py`, `openai_responses.py` and `anthropic.py` add what is their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal, Protocol

from pydantic import BeforeValidator, Field

from ...core.request import MAX_COUNT, Sampling
from ...text.reasoning import EFFORTS
from .protocol import ApiRequest, ServedModel
from .response_formats import StructuredOutputs, constraints_of, parse_schema
from .validation import (
    INVALID_TYPE,
    UNSUPPORTED,
    Items,
    JsonObject,
    Mapped,
    RequestError,
    RequestModel,
    Text,
    describe,
    fail,
    refuse,
)

# llama.cpp's default order, in its two forms.
_DEFAULT_SAMPLERS = (
    "edskypmxt",
    "edkypmxt",
    ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
    ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
)
_OTHER_NAMES = {"repetition_penalty": "repeat_penalty"}
_ZERO, _ONE, _NO, _YES = (0,), (1,), (False,), (True,)
_EMPTY: Sequence[Any] = ([], {}, "")

# What changes the answer, and the values that do not. A model obeys what it declares.
_UNSUPPORTED = refuse(
    # vLLM, SGLang, llama.cpp, Text Generation WebUI, TabbyAPI
    adaptive_target=(-1,),
    add_bos_token=_YES,
    add_generation_prompt=_YES,
    add_special_tokens=(True, False),
    allowed_token_ids=(),
    bad_words=_EMPTY,
    ban_eos_token=_NO,
    banned_strings=_EMPTY,
    banned_tokens=_EMPTY,
    chat_template=_EMPTY,
    custom_logit_processor=_EMPTY,
    custom_token_bans=_EMPTY,
    do_sample=_YES,
    documents=_EMPTY,
    dry_multiplier=_ZERO,
    dynamic_temperature=_NO,
    dynatemp_range=_ZERO,
    early_stopping=_NO,
    ebnf=_EMPTY,
    encoder_repetition_penalty=_ONE,
    epsilon_cutoff=_ZERO,
    eta_cutoff=_ZERO,
    grammar=_EMPTY,
    grammar_string=_EMPTY,
    guidance_scale=_ONE,
    guided_decoding_backend_options=_EMPTY,
    guided_whitespace_pattern=(),
    image_data=_EMPTY,
    include_stop_str_in_output=_NO,
    input_embeds=(),
    input_ids=(),
    length_penalty=_ONE,
    logits_processors=_EMPTY,
    logprob_token_ids=_EMPTY,
    lora=_EMPTY,
    lora_adapter=_EMPTY,
    lora_path=_EMPTY,
    mirostat=_ZERO,
    mirostat_mode=_ZERO,
    n_cmpl=_ONE,
    n_indent=_ZERO,
    negative_prompt=_EMPTY,
    no_repeat_ngram_size=_ZERO,
    no_stop_trim=_NO,
    num_beams=_ONE,
    parse_tool_calls=_YES,
    penalty_alpha=_ZERO,
    prompt_embeds=_EMPTY,
    repetition_detection=_EMPTY,
    return_hidden_states=_NO,
    return_meta_info=_NO,
    return_prompt_text=_NO,
    return_prompt_token_ids=_NO,
    return_token_ids=_NO,
    return_tokens_as_token_ids=_NO,
    return_routed_experts=_NO,
    samplers=([], *_DEFAULT_SAMPLERS),
    separate_reasoning=_YES,
    session_params=_EMPTY,
    skip_special_tokens=_YES,
    smoothing_factor=_ZERO,
    spaces_between_special_tokens=_YES,
    stop_regex=_EMPTY,
    stop_token_ids=_EMPTY,
    stream_reasoning=_YES,
    structural_tag=_EMPTY,
    t_max_predict_ms=(0, -1),
    task=_EMPTY,
    temperature_last=_NO,
    tfs=_ONE,
    tfs_z=_ONE,
    top_a=_ZERO,
    top_n_sigma=(-1, 0),
    truncate_prompt_tokens=(-1,),
    typ_p=_ONE,
    typical=_ONE,
    typical_p=_ONE,
    use_beam_search=_NO,
    vllm_xargs=_EMPTY,
    watermarking=_NO,
    xtc_probability=_ZERO,
    # Hosted services
    deferred=_NO,
    disable_reasoning=_NO,
    input_audio=_EMPTY,
    min_thinking_tokens=_ZERO,
    nvext=_EMPTY,
    preset=_EMPTY,
    prompt_mode=_EMPTY,
    prompt_truncate_len=(),
    raw_output=_NO,
    safe_prompt=_NO,
    # Other APIs' parameters, each declared where it is obeyed
    audio=_EMPTY,
    background=_NO,
    best_of=_ONE,
    compaction=(),
    continue_final_message=_NO,
    conversation=_EMPTY,
    echo=_NO,
    format=_EMPTY,
    function_call=("none", "auto"),
    functions=_EMPTY,
    ignore_eos=_NO,
    input=_EMPTY,
    instructions=_EMPTY,
    logprobs=(False, 0),
    max_completion_tokens=(-1,),
    max_output_tokens=(-1,),
    max_tokens=(-1,),
    messages=_EMPTY,
    min_tokens=_ZERO,
    modalities=(["text"], []),
    n=_ONE,
    n_predict=(-1,),
    output_config=_EMPTY,
    output_format=_EMPTY,
    parallel_tool_calls=_YES,
    prefix=_EMPTY,
    previous_response_id=_EMPTY,
    prompt=_EMPTY,
    prompt_id=_EMPTY,
    prompt_logprobs=(),
    raw=_NO,
    response_format=({"type": "text"}, {}),
    stop=_EMPTY,
    stop_sequences=_EMPTY,
    suffix=_EMPTY,
    system=_EMPTY,
    template=_EMPTY,
    text=({"format": {"type": "text"}}, {}),
    tool_choice=("none", "auto", {"type": "none"}, {"type": "auto"}),
    tools=_EMPTY,
    top_logprobs=_ZERO,
)


def _read_biases(value: Any) -> Any:
    """A list of pairs is llama.cpp's form, and what PHP makes of an empty object."""
    if not isinstance(value, list):
        return value
    biases: JsonObject = {}
    for at, pair in enumerate(value):
        is_pair = isinstance(pair, list) and len(pair) == 2
        if not is_pair or type(pair[0]) is not int:
            got = f"got {describe(pair)} as item {at}"
            fail(
                f"expected an object, or lists of a token id and its bias, {got}", code=INVALID_TYPE
            )
        biases[str(pair[0])] = -100.0 if pair[1] is False else pair[1]
    return biases


MAX_VARIABLES = 100  # of a chat template; it is searched for each
_Window = Annotated[int, Field(ge=-1, le=MAX_COUNT)]


class FormatOption(Protocol):
    """A response format of an API."""

    def to_grammar(self, field: str) -> str | None:
        """Its grammar; `field` is its path in the request. None: anything matches."""


class SharedParameters(ApiRequest):
    """What every API that generates has, under one name."""

    unsupported = _UNSUPPORTED
    stream: bool = Field(False, description="Respond with server-sent events.")
    top_p: float = Field(1.0, ge=0, le=1, description="Nucleus sampling; 0: only the best token.")
    top_k: int = Field(0, ge=-1, description="Sample from so many tokens; 0 or -1: from all.")
    min_p: float = Field(0.0, ge=0, le=1, description="Least probability, of the best token's.")
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    random_seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1, description="Same as seed.")
    repetition_penalty: float = Field(1.0, gt=0, le=10, description="1 is none.")
    repeat_penalty: float = Field(1.0, gt=0, le=10, description="Same as repetition_penalty.")
    repetition_context_size: _Window = Field(
        20, description="Over how many of the last tokens it counts; -1: all; 0: no penalty."
    )
    presence_context_size: _Window = Field(20, description="The same for presence_penalty.")
    frequency_context_size: _Window = Field(20, description="The same for frequency_penalty.")
    repeat_last_n: _Window | None = Field(None, description="The same for all penalties.")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    logit_bias: Annotated[
        Mapped[Annotated[float, Field(ge=-100, le=100)]], BeforeValidator(_read_biases)
    ] = Field({}, description="Added to the logits of token ids.")

    guided_json: Annotated[JsonObject | None, BeforeValidator(parse_schema)] = Field(
        None, description="Same as a json_schema format; an object, or its text."
    )
    guided_regex: Text | None = Field(None, description="Same as a regex format.")
    guided_choice: Items[Text] = Field([], description="One of these texts.")
    guided_grammar: Text | None = Field(None, description="Same as a grammar format.")
    regex: Text | None = Field(None, description="Same as a regex format.")
    json_schema: Annotated[JsonObject | None, BeforeValidator(parse_schema)] = Field(
        None, description="Same as a json_schema format; an object, or its text."
    )
    structured_outputs: Annotated[
        StructuredOutputs | None,
        # OpenRouter's is true or false and says only that a format will be sent.
        BeforeValidator(lambda value: None if isinstance(value, bool) else value),
    ] = Field(None, description="vLLM's form of these.")

    @property
    def _repetition_penalty(self) -> float:
        same = self.repetition_penalty == 1
        return self.repeat_penalty if same else self.repetition_penalty

    @property
    def _repetition_window(self) -> int:
        """Over how many tokens a penalty of the checkpoint's counts."""
        if self.repeat_last_n is not None:
            return self.repeat_last_n
        if "repetition_context_size" in self.model_fields_set:
            return self.repetition_context_size
        return -1  # all, as transformers has it

    def sampling_for(self, served: ServedModel) -> Sampling:
        """The sampling parameters.

        Raises:
            RequestError: a name in `logit_bias` is not a token id of the model.
        """
        biases: dict[int, float] = {}
        wrong: list[str] = []
        for key, bias in self.logit_bias.items():
            token = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else -1
            if not 0 <= token < served.vocab_size:
                wrong.append(key[:80])
            biases[token] = bias
        if wrong:
            reason = f"expected a token id from 0 to {served.vocab_size - 1} as the name"
            also = f"; also wrong: {', '.join(wrong[1:10])}" if wrong[1:] else ""
            raise RequestError(f"logit_bias.{wrong[0]}", reason + also)
        names = {field.name for field in fields(Sampling)} & type(self).model_fields.keys()
        values = {name: getattr(self, name) for name in names}
        values |= {"logit_bias": biases, "repetition_penalty": self._repetition_penalty}
        values["seed"] = self.random_seed if self.seed is None else self.seed
        penalties = {
            "repetition_context_size": self._repetition_penalty != 1,
            "presence_context_size": self.presence_penalty != 0,
            "frequency_context_size": self.frequency_penalty != 0,
        }
        for name, is_set in penalties.items():
            if not is_set:
                del values[name]
            elif self.repeat_last_n is not None:
                values[name] = self.repeat_last_n
        for name, default in served.sampling_defaults.items():
            if self.model_fields_set & {name, _OTHER_NAMES.get(name, name)}:
                continue
            values[name] = default
            if name == "repetition_penalty":
                values["repetition_context_size"] = self._repetition_window
        values["top_k"] = max(values["top_k"], 0)
        if self.top_p == 0:
            values |= {"top_p": 1.0, "top_k": 1}
        return Sampling(**values)

    def grammar_of(self, field: str, option: FormatOption | None) -> tuple[str, str | None]:
        """The field of the one format that is asked for, and its grammar; None: there is none.

        Args:
            field: of the API's own format.
            wanted: that format; None: none, or it allows any text.

        Raises:
            RequestError: there are several, or it cannot be enforced.
        """
        forms: dict[str, Callable[[str], str | None]] = {}
        if option is not None:
            forms[field] = option.to_grammar
        forms |= constraints_of(
            {
                "guided_json": self.guided_json,
                "json_schema": self.json_schema,
                "guided_regex": self.guided_regex,
                "regex": self.regex,
                "guided_choice": self.guided_choice or None,
                "guided_grammar": self.guided_grammar,
            }
        )
        if self.structured_outputs is not None:
            forms |= self.structured_outputs.constraints()
        if len(forms) > 1:
            first, second, *_ = forms
            raise RequestError(
                second, f"not supported together with {first}; remove one", UNSUPPORTED
            )
        for name, to_grammar in forms.items():
            return name, to_grammar(name)
        return field, None


def _read_effort(value: Any) -> Any:
    """LiteLLM sends an object, SGLang's clients a number from 0 to 1."""
    effort = value.get("effort") if isinstance(value, dict) else value
    if isinstance(effort, int | float) and not isinstance(effort, bool) and 0 <= effort <= 1:
        return EFFORTS[round(effort * (len(EFFORTS) - 1))]
    return None if effort == "" else effort


Effort = Annotated[Text | None, BeforeValidator(_read_effort)]
"""OpenAI's words, from none to max; others are taken as the nearest of them, with a warning."""


def _check_think(value: Any) -> Any:
    if not isinstance(value, bool | str | None):
        fail(f"expected true, false or an effort, got {describe(value)}", code=INVALID_TYPE)
    return value


class ThinkingSwitch(RequestModel):
    """The form of several hosted services."""

    type: Literal["enabled", "disabled", "auto", "adaptive"] = "enabled"
    budget_tokens: int | None = Field(default=None, ge=1)

    def to_thinking(self) -> tuple[bool | None, int | None]:
        """Whether to reason, and the most tokens of it; None: as the model has it."""
        return {"enabled": True, "disabled": False}.get(self.type), self.budget_tokens


class ReasoningOptions(RequestModel):
    """OpenAI's form in responses, and OpenRouter's."""

    effort: Effort = Field(default=None, description="How much the model may reason.")
    enabled: bool | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    exclude: bool = Field(default=False, description="Leave reasoning out of the response.")


class ReasoningParameters(ApiRequest):
    """Whether and how much a model reasons first, as many servers name it."""

    reasoning: ReasoningOptions = Field(
        ReasoningOptions(), description="How much the model may reason."
    )
    reasoning_effort: Effort = Field(None, description="Same as in reasoning.")
    enable_thinking: bool | None = Field(None, description="Whether the model reasons first.")
    thinking_budget: int | None = Field(None, ge=1, description="Most tokens of reasoning.")
    thinking_token_budget: int | None = Field(None, ge=1, description="Same as thinking_budget.")
    thinking_budget_tokens: int | None = Field(None, ge=1, description="Same as thinking_budget.")
    max_thinking_tokens: int | None = Field(None, ge=1, description="Same as thinking_budget.")
    thinking: ThinkingSwitch | None = Field(None, description="Another form of these two.")
    think: Annotated[bool | Text | None, BeforeValidator(_check_think)] = Field(
        None, description="Another form: whether the model reasons, or its effort."
    )
    include_reasoning: bool = Field(True, description="false: leave it out of the response.")
    reasoning_format: Literal["auto", "parsed", "deepseek", "hidden"] = Field(
        "auto", description="hidden: leave it out of the response."
    )
    chat_template_kwargs: JsonObject = Field(
        {}, max_length=MAX_VARIABLES, description="Variables of the chat template."
    )

    def reasoning_fields(self) -> JsonObject:
        """Fields of the `GenerationRequest` that come from these parameters."""
        switch, budget = self.thinking.to_thinking() if self.thinking else (None, None)
        think = self.think if isinstance(self.think, bool) else None
        word = self.think if isinstance(self.think, str) and self.think else None
        enabled = (self.enable_thinking, switch, self.reasoning.enabled, think)
        budgets = (
            self.thinking_budget,
            self.thinking_token_budget,
            self.thinking_budget_tokens,
            self.max_thinking_tokens,
            budget,
            self.reasoning.max_tokens,
        )
        efforts = (self.reasoning_effort, self.reasoning.effort, word)
        hidden = not self.include_reasoning or self.reasoning_format == "hidden"
        return {
            "enable_thinking": _first_present(enabled),
            "thinking_budget": _first_present(budgets),
            "reasoning_effort": _first_present(efforts),
            "hide_reasoning": hidden or self.reasoning.exclude,
            "template_kwargs": self.chat_template_kwargs,
        }


def _first_present(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if value is not None), None)
