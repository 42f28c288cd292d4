"""The tokenizer in a GGUF file as the Hub's files: tokenizer.json and tokenizer_config.json.

Owns: both kinds of vocabulary, byte-level BPE ("gpt2") and SentencePiece with scores ("llama"), how
text is split before BPE, special tokens, and which tokens end an output.
Does not know: models, the tokenizers library.
How: llama.cpp merges SentencePiece's pairs by the score of what they make; BPE with the merges in
the order of those scores does the same.
Next: `demo/cut_experts.py` writes the files.
"""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError
from .file import Metadata

_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # values of tokenizer.ggml.token_type
MAX_SPLIT_CHARACTERS = 64  # of a SentencePiece token whose merges are worked out

_CONTRACTIONS = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL
_QWEN35 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_CASED_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293"
    "\u0295-\u02af\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c"
    "\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5"
    "\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59"
    "\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc"
    "\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107"
    "\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    "\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee"
    "\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
    "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2"
    "\U000118a0-\U000118df\U0001e900-\U0001e943"
)
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_CASED_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_BAILING = (
    r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre -> the expressions that split text, one after another (llama-vocab.cpp)
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "mellum", "granite-docling"), (_GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "mellum2"),
        (r"\p{N}", _GPT2),
    ),
    **dict.fromkeys(
        (
            *("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "lfm2", "dbrx"),
            *("smaug-bpe", "glm4", "chatglm-bpe"),
        ),
        (_LLAMA3,),
    ),
    **dict.fromkeys(
        ("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
        (_QWEN2,),
    ),
    "qwen35": (_QWEN35,),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), (_GPT4O,)),
    "deepseek-llm": _DEEPSEEK_LLM,
    **dict.fromkeys(("deepseek-v3", "hunyuan-dense", "joyai-llm"), _DEEPSEEK3),
    **dict.fromkeys(("bailingmoe", "bailingmoe2", "llada-moe"), (_BAILING,)),
}

# Tokens that end an output whatever the file's eos_token_id says, as in llama.cpp.
_END_TOKENS = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<turn|>", "<|endoftext|>"),
    *("<|eom_id|>", "<|return|>", "<|call|>", "<|eot|>", "<|end_of_text|>", "[EOS]", "[EOT]"),
    *("<|user|>", "<|observation|>", "<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>"),
)


def tokenizer_files(metadata: Metadata) -> dict[str, dict[str, Any]]:
    """tokenizer.json and tokenizer_config.json of a model, by name.

    Raises:
        CheckpointError: there is no vocabulary, it is inconsistent, or of a kind that is not known.
    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(t, str) for t in tokens) or not tokens:
        raise CheckpointError(
            "expected a vocabulary (tokenizer.ggml.tokens), got none; give the first file of a "
            "split model, or another copy"
        )
    kinds = _list_of(metadata, "token_type", len(tokens), [1] * len(tokens))
    name = metadata.get("tokenizer.ggml.model")
    if name == "gpt2":
        tokenizer = _byte_level(metadata, tokens)
    elif name == "llama":
        tokenizer = _sentencepiece(metadata, tokens, kinds)
    else:
        raise CheckpointError(
            f"expected a vocabulary of kind 'gpt2' or 'llama', got {name!r:.100}; use a checkpoint "
            "in the Hub's format"
        )
    special = {_UNKNOWN, _CONTROL}
    tokenizer["added_tokens"] = [
        {
            **{"id": i, "content": tokens[i], "special": kind in special, "normalized": False},
            **{"single_word": False, "lstrip": False, "rstrip": False},
        }
        for i, kind in enumerate(kinds)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and tokens[i]
    ]
    tokenizer["post_processor"] = _post_processor(metadata, tokens)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
    }
    for key in ("bos", "eos", "unknown", "padding"):
        index = special_token(metadata, key)
        if index is not None:
            config[f"{ {'unknown': 'unk', 'padding': 'pad'}.get(key, key) }_token"] = tokens[index]
    if isinstance(template := metadata.get("tokenizer.chat_template"), str):
        config["chat_template"] = template
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def special_token(metadata: Metadata, key: str) -> int | None:
    """The id of a special token, such as "bos"; None: there is none.

    Raises:
        CheckpointError: it is no id of the vocabulary.
    """
    index = metadata.get(f"tokenizer.ggml.{key}_token_id")
    count = len(metadata["tokenizer.ggml.tokens"])
    if index is None or index == 2**32 - 1:
        return None
    if not isinstance(index, int) or not 0 <= index < count:
        raise CheckpointError(
            f"tokenizer.ggml.{key}_token_id: expected an id below {count}, got {index!r:.100}"
        )
    return index


def end_tokens(metadata: Metadata) -> list[int]:
    """Ids of the tokens that end an output, the file's eos_token_id first."""
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    kinds = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    named = [special_token(metadata, key) for key in ("eos", "eot", "eom")]
    others = [
        i
        for i, t in enumerate(tokens)
        if t in _END_TOKENS and kinds[i] in (_CONTROL, _USER_DEFINED)
    ]
    return list(dict.fromkeys([i for i in [*named, *others] if i is not None]))


def _list_of(metadata: Metadata, key: str, length: int, default: list[Any] | None) -> list[Any]:
    values = metadata.get(f"tokenizer.ggml.{key}", default)
    if (
        not isinstance(values, list)
        or len(values) != length
        or not all(isinstance(value, int | float) for value in values)
    ):
        got = len(values) if isinstance(values, list) else "none"
        raise CheckpointError(f"tokenizer.ggml.{key}: expected {length} numbers, got {got}")
    return list(values)


def _post_processor(metadata: Metadata, tokens: list[str]) -> dict[str, Any] | None:
    """Adds the first token, and the last one, where the file says so."""
    is_sentencepiece = metadata.get("tokenizer.ggml.model") == "llama"
    bos = special_token(metadata, "bos")
    eos = special_token(metadata, "eos")
    text = {"Sequence": {"id": "A", "type_id": 0}}
    parts, used = [text], {}
    if metadata.get("tokenizer.ggml.add_bos_token", is_sentencepiece) and bos is not None:
        parts.insert(0, {"SpecialToken": {"id": tokens[bos], "type_id": 0}})
        used[tokens[bos]] = {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}
    if metadata.get("tokenizer.ggml.add_eos_token", False) and eos is not None:
        parts.append({"SpecialToken": {"id": tokens[eos], "type_id": 0}})
        used[tokens[eos]] = {"id": tokens[eos], "ids": [eos], "tokens": [tokens[eos]]}
    if not used:
        return None
    return {
        "type": "TemplateProcessing",
        "single": parts,
        "pair": [*parts, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": used,
    }


def _byte_level(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    kind = metadata.get("tokenizer.ggml.pre", "gpt-2")
    if kind not in SPLITS:
        raise CheckpointError(
            f"tokenizer.ggml.pre: expected one of {', '.join(SPLITS)}, got {kind!r:.100}; use a "
            "checkpoint in the Hub's format"
        )
    merges = metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise CheckpointError("tokenizer.ggml.merges: expected a list of merges, got none")
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [merge.split(" ", 1) for merge in merges]
    for pair in pairs:
        if len(pair) != 2 or not {*pair, "".join(pair)} <= vocabulary.keys():
            raise CheckpointError(
                f"tokenizer.ggml.merges: expected two tokens that make a third, got {pair!r:.100}"
            )
    splits = [
        {
            **{"type": "Split", "pattern": {"Regex": expression}},
            **{"behavior": "Isolated", "invert": False},
        }
        for expression in SPLITS[kind]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    is_llama3 = kind in ("llama3", "llama-v3", "llama-bpe", "gpt-4o", "llama4")
    return {
        "version": "1.0",
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [*splits, {**byte_level, "trim_offsets": True}],
        },
        "decoder": {**byte_level, "trim_offsets": True},
        "model": {
            **{"type": "BPE", "byte_fallback": False, "fuse_unk": False},
            "ignore_merges": is_llama3,
            **{"vocab": vocabulary, "merges": pairs},
        },
    }


def _sentencepiece(metadata: Metadata, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    scores = _list_of(metadata, "scores", len(tokens), None)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    unknown = next((t for t, kind in zip(tokens, kinds, strict=True) if kind == _UNKNOWN), None)
    index = special_token(metadata, "unknown")
    unknown = tokens[index] if index is not None else unknown
    return {
        "version": "1.0",
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                *([{"type": "Prepend", "prepend": "\u2581"}] if prefix else []),
                replace,
            ],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                *(back, {"type": "ByteFallback"}, {"type": "Fuse"}),
                *([strip] if prefix else []),
            ],
        },
        "model": {
            **{"type": "BPE", "unk_token": unknown, "fuse_unk": True},
            "byte_fallback": _BYTE in kinds,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": _merges_by_score(tokens, kinds, scores),
        },
    }


def _merges_by_score(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    usual = {t: i for i, t in enumerate(tokens) if kinds[i] not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges: list[tuple[float, int, int, int]] = []
    for token, index in usual.items():
        if len(token) > MAX_SPLIT_CHARACTERS:
            continue
        for i in range(1, len(token)):
            left, right = usual.get(token[:i]), usual.get(token[i:])
            if left is not None and right is not None:
                merges.append((-scores[index], index, left, right))
    merges.sort()
    return [[tokens[left], tokens[right]] for _, _, left, right in merges]
