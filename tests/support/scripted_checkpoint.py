"""Writes a small MoE checkpoint whose weights play scripts: think, call a tool, answer.

Owns: weights, tokenizer and chat template of such a checkpoint (Qwen3-MoE's form, loaded as any).
Does not know: servers, clients.
How: a prompt names its script by a word of its own (`Script.word`, one token). One attention layer
finds that word, whether there are tools, and whether a tool's result is in the history; its router
takes from this the expert of one script and one part (call or answer), which at the end of the
prompt writes the code of that part's first piece. From there on the head is a table: each piece of
a script is a token of its own, which occurs once in all scripts and is never made from text, and
its code gives the next one.
Invariant: greedy or sampled, the same script is played; without a script's word, `DEFAULT`.
"""

import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
TOOLS_TAG = "<tools>"
CORPUS = Path(__file__).resolve().parents[2] / "docs"
BASE_SIZE = 4096  # tokens that text is made of
CODE, FEATURES = 512, 256  # channels
HEADS, HEAD_DIM = 4, 64
SLOTS = HEAD_DIM  # scripts at most
WIDTH = 32  # of an expert
LENGTHS = range(2, 40)  # of pieces, in letters; short ones if they are free

# Channels of the residual stream behind the codes.
ONE, LINE, TWO_LINES, IS_WORD, IS_RESULT, IS_TOOLS, HAS_RESULT, HAS_TOOLS = range(CODE, CODE + 8)
BEGINS_THOUGHT = CODE + 8
BEGINNINGS = (LINE, BEGINS_THOUGHT, TWO_LINES)
WORD_IN, WORD_OUT = CODE + 64, CODE + 128

TEMPLATE = """\
{%- if tools %}<|im_start|>system
{% if messages[0].role == "system" %}{{ messages[0].content }}

{% endif %}# Tools

You may call functions. Their signatures:
<tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools>

A call is a JSON object with name and arguments, between <tool_call> and </tool_call>.<|im_end|>
{% elif messages[0].role == "system" %}<|im_start|>system
{{ messages[0].content }}<|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "system" and not loop.first %}
{{- raise_exception("System message must be at the beginning.") }}
{%- elif message.role == "user" -%}
<|im_start|>user
{{ message.content }}<|im_end|>
{% elif message.role == "assistant" -%}
<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content or "" }}
{%- for call in message.tool_calls or [] %}
{%- set tool_call = call.function %}
<tool_call>
{"name": "{{ tool_call.name }}", "arguments": {{ tool_call.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% elif message.role == "tool" -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% endif %}{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""


@dataclass(frozen=True)
class Script:
    """What is said when a prompt has a word.

    Args:
        word: in the prompt; it should occur nowhere else.
        tool, arguments: the call, where there are tools and no result yet; no tool: answer at once.
        answer: afterwards.
        thinks: before both, unless thinking is off.
    """

    word: str
    answer: str
    tool: str = ""
    arguments: Any = None
    thinks: bool = True

    def parts(self) -> list[tuple[str, str, str]]:
        """Thought, words, and the words where calls are forced: of the call, and of the answer."""
        name = self.word.partition(":")[2]
        answer = (f"\n{name} has been played, I answer.\n", self.answer, "")
        if not self.tool:
            return [answer, answer]
        call = json.dumps({"name": self.tool, "arguments": self.arguments or {}})
        thought = f"\nI call {self.tool} to play {name}.\n"
        return [(thought, f"<tool_call>\n{call}\n</tool_call>", f"[{call}]"), answer]


@dataclass(frozen=True)
class _Part:
    """Pieces of a script's call or answer."""

    thinks: bool
    thought: list[str]
    output: list[str]
    forced: list[str]


DEFAULT = Script("", "A scripted answer.", thinks=False)


def write_scripted_checkpoint(folder: Path, scripts: Sequence[Script]) -> Path:
    """Write a checkpoint that plays `scripts`, at most 63 of them."""
    played = [DEFAULT, *scripts]
    assert len(played) <= SLOTS, f"expected at most {SLOTS - 1} scripts, got {len(scripts)}"
    folder.mkdir(parents=True, exist_ok=True)
    base = _train_tokenizer()
    pieces = _Pieces(base)
    parts = [
        [
            _Part(script.thinks, *(pieces.split(text) for text in texts))
            for texts in dict.fromkeys(script.parts())
        ]
        for script in played
    ]
    tokenizer = _add_tokens(base, pieces.texts, [s.word for s in scripts])
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    weights = _Weights(tokenizer, len(played)).write(parts, [s.word for s in scripts])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    _write_json(folder / "config.json", _config(tokenizer, 2 * len(played)))
    ends = [tokenizer.token_to_id(t) for t in SPECIAL[::2]]
    _write_json(folder / "generation_config.json", {"eos_token_id": ends, "do_sample": False})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": 262144,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "additional_special_tokens": list(SPECIAL),
            "clean_up_tokenization_spaces": False,
            "chat_template": TEMPLATE,
        },
    )
    return folder


def _config(tokenizer: Tokenizer, experts: int) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": CODE + FEATURES,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "head_dim": HEAD_DIM,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": WIDTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e15,  # its slowest channels do not turn: only content counts
        "max_position_embeddings": 262144,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    }


def _train_tokenizer() -> Tokenizer:
    """A byte-level BPE of English prose and JSON: about three letters a token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=BASE_SIZE,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = [path.read_text() for path in sorted(CORPUS.glob("*.md"))]
    tokenizer.train_from_iterator([*texts, "\n\n" * 1000], trainer)
    return tokenizer


class _Pieces:
    """Texts cut into pieces that are all different, and no tokens yet."""

    def __init__(self, base: Tokenizer) -> None:
        self._taken = set(base.get_vocab())
        self.texts: list[str] = []  # in the letters of byte-level vocabularies
        self._random = random.Random(0)
        self._letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def split(self, text: str) -> list[str]:
        if not text:
            return []
        whole = "".join(piece for piece, _ in self._letters.pre_tokenize_str(text))
        for attempt in range(2000):
            pieces: list[str] = []
            rest = whole
            while rest:
                heads = {rest[:length] for length in LENGTHS}
                free = sorted(heads - self._taken - set(pieces) - {""}, key=len)[
                    : 4 + attempt // 50
                ]
                if not free:
                    break
                pieces.append(self._random.choice(free))
                rest = rest[len(pieces[-1]) :]
            else:
                self._taken.update(pieces)
                self.texts += pieces
                return pieces
        raise ValueError(f"too much like other texts of the scripts: {text!r}")


def _add_tokens(base: Tokenizer, pieces: Sequence[str], words: Sequence[str]) -> Tokenizer:
    source = json.loads(base.to_str())
    vocab = source["model"]["vocab"]
    vocab.update({piece: len(vocab) + at for at, piece in enumerate(pieces)})
    tokenizer = Tokenizer.from_str(json.dumps(source))
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    plain = [*TAGS, TOOLS_TAG, *words]
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    return tokenizer


class _Weights:
    """The tensors, in Qwen3-MoE's names."""

    def __init__(self, tokenizer: Tokenizer, scripts: int) -> None:
        size, hidden = tokenizer.get_vocab_size(), CODE + FEATURES
        self._ids = tokenizer.token_to_id
        self._random = np.random.default_rng(0)
        self._scripts = scripts
        self._embedding = np.zeros((size, hidden), np.float32)
        self._head = np.zeros((size, hidden), np.float32)
        # What no script has looks the same to the head.
        self._embedding[:, :CODE] = self._other = self._code()
        self._embedding[:, ONE] = 1

    def _code(self) -> np.ndarray:
        return self._random.choice((-1.0, 1.0), CODE).astype(np.float32)

    def write(
        self, scripts: Sequence[Sequence[_Part]], words: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """`scripts`: parts of each, call and answer or only an answer."""
        for token, feature in (
            ("Ċ", LINE),
            ("ĊĊ", TWO_LINES),
            ("<think>", BEGINS_THOUGHT),
            ("</think>", TWO_LINES),
            ("<tool_response>", IS_RESULT),
            (TOOLS_TAG, IS_TOOLS),
        ):
            self._embedding[self._ids(token), feature] = 1
        for slot, word in enumerate(words, 1):
            self._embedding[self._ids(word), [IS_WORD, WORD_IN + slot]] = 1
        starts = [[self._chain(part) for part in parts] for parts in scripts]
        self._follow(self._other, self._ids(scripts[0][0].output[0]))  # a prompt without template
        hidden = CODE + FEATURES
        layer = "model.layers.0."
        tensors = {
            "model.embed_tokens.weight": self._embedding,
            "lm_head.weight": self._head,
            "model.norm.weight": np.ones(hidden, np.float32),
            f"{layer}input_layernorm.weight": np.ones(hidden, np.float32),
            f"{layer}post_attention_layernorm.weight": np.ones(hidden, np.float32),
            f"{layer}mlp.gate.weight": self._router(),
        }
        tensors |= {f"{layer}self_attn.{k}": v for k, v in self._attention().items()}
        experts = [codes for parts in starts for codes in (parts[0], parts[-1])]
        for at, codes in enumerate(experts):
            for name, tensor in self._expert(codes).items():
                tensors[f"{layer}mlp.experts.{at}.{name}"] = tensor
        return tensors

    def _chain(self, part: _Part) -> list[np.ndarray]:
        """Codes that begin a part: at its thought's marker, in its thought, and after it."""
        first, thought, after = (self._code() for _ in range(3))
        self._link(thought, [*part.thought, "</think>"])
        self._link(after, [*part.output, "<|im_end|>"])
        if part.forced:  # what a grammar lets through if it refuses what is said
            self._link(after, [*part.forced, "<|im_end|>"], weight=0.5)
        if part.thinks:
            self._follow(first, self._ids("<think>"))
        else:
            first = after
        return [first, thought, after]

    def _link(self, code: np.ndarray, pieces: Sequence[str], weight: float = 1) -> None:
        for piece in pieces:
            token = self._ids(piece)
            self._follow(code * weight, token)
            if piece == pieces[-1]:
                break
            code, weight = self._code(), 1
            self._embedding[token, :CODE] = code

    def _follow(self, code: np.ndarray, token: int) -> None:
        self._head[token, :CODE] += code / 4

    def _attention(self) -> dict[str, np.ndarray]:
        hidden, wide = CODE + FEATURES, HEADS * HEAD_DIM
        q, k, v = (np.zeros((wide, hidden), np.float32) for _ in range(3))
        out = np.zeros((hidden, wide), np.float32)
        still = HEAD_DIM // 2 - 1  # the channel that positions do not turn
        for head, feature in enumerate((IS_WORD, IS_RESULT, IS_TOOLS)):
            q[head * HEAD_DIM + still, ONE] = 1
            k[head * HEAD_DIM + still, feature] = 1
        for slot in range(1, self._scripts):
            v[slot, WORD_IN + slot] = 1
            out[WORD_OUT + slot, slot] = 1
        for head, feature, found in ((1, IS_RESULT, HAS_RESULT), (2, IS_TOOLS, HAS_TOOLS)):
            v[head * HEAD_DIM, feature] = 1
            out[found, head * HEAD_DIM] = 1
        norm = np.full(HEAD_DIM, math.sqrt(HEAD_DIM), np.float32)
        projections = {"q_proj": q, "k_proj": k, "v_proj": v, "o_proj": out}
        norms = {"q_norm.weight": norm, "k_norm.weight": np.ones(HEAD_DIM, np.float32)}
        return norms | {f"{name}.weight": tensor for name, tensor in projections.items()}

    def _router(self) -> np.ndarray:
        gate = np.zeros((2 * self._scripts, CODE + FEATURES), np.float32)
        for script in range(self._scripts):
            for expert in (2 * script, 2 * script + 1):
                # The default wins where no word was found.
                gate[expert, WORD_OUT + script if script else ONE] = 1000 if script else 500
            gate[2 * script, [HAS_TOOLS, HAS_RESULT, ONE]] = 200, -400, -100
        return gate

    def _expert(self, codes: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        hidden = CODE + FEATURES
        gate, up = (np.zeros((WIDTH, hidden), np.float32) for _ in range(2))
        down = np.zeros((hidden, WIDTH), np.float32)
        for unit, (feature, code) in enumerate(zip(BEGINNINGS, codes, strict=True)):
            gate[unit, feature] = 20  # silu(0) is 0: elsewhere an expert says nothing
            up[unit, ONE] = 1
            down[:CODE, unit] = code / 2
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down}


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1))


if __name__ == "__main__":  # FOLDER SCRIPTS.json: a list of objects with Script's fields
    write_scripted_checkpoint(
        Path(sys.argv[1]), [Script(**s) for s in json.loads(Path(sys.argv[2]).read_text())]
    )
