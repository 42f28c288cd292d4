"""Tokenizers that are published as tiktoken's list of tokens and a Python class: Kimi's.

Owns: writing them as a tokenizer.json, into a folder of Cenacle's own.
Does not know: models, chat templates.
Invariant: the class is never run. Its text only has to hold the expression that is known here.
Next: `text_backend.py` loads the folder.
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..paths import models_dir
from .detokenizer import byte_alphabet

FILE_NAME = "tiktoken.model"
CLASS_NAME = "TikTokenTokenizer"
FORMAT_VERSION = 1  # of the folder; another version's is not read
MAX_FILE_BYTES = 64 << 20  # Kimi's has 2.8 MB
MAX_TOKENS = 1_000_000
MAX_TOKEN_BYTES = 512  # splits are tried at every byte
RESERVED_TOKENS = 256  # ids behind the list, of which tokenizer_config.json names some
# How Kimi's class splits a text before it joins bytes.
SPLITS = (
    r"[\p{Han}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}",
    r" ?[^\s\p{L}\p{N}]+[\r\n]*",
    r"\s*[\r\n]+",
    r"\s+(?!\S)",
    r"\s+",
)
_COPIED = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json")
# Of tokenizer_config.json: what names the class, and what would be added once more.
_LEFT_OUT = ("auto_map", "tokenizer_class", "added_tokens_decoder")


def is_tiktoken(folder: Path) -> bool:
    """Whether a checkpoint has its tokenizer in this form only."""
    return (folder / FILE_NAME).is_file() and not (folder / "tokenizer.json").exists()


def prepare_folder(folder: Path) -> Path:
    """A folder with the same tokenizer as a tokenizer.json, written if it does not exist.

    Raises:
        CheckpointError: the list of tokens is damaged, or the class splits texts in another way.
    """
    listed, config = _read(folder / FILE_NAME), _read_config(folder)
    _check_class(folder, config)
    key = hashlib.sha256(bytes([FORMAT_VERSION]) + json.dumps(config).encode() + b"\0" + listed)
    for name in _COPIED:
        if (folder / name).is_file():
            key.update(b"\0" + _read(folder / name))
    prepared = models_dir() / f"tokenizer-{key.hexdigest()[:16]}"
    if prepared.is_dir():
        return prepared
    tokenizer = _build(folder, listed, config)
    kept = {name: value for name, value in config.items() if name not in _LEFT_OUT}
    temporary = prepared.with_name(f".{prepared.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir(parents=True)
        tokenizer.save(str(temporary / "tokenizer.json"))
        content = {**kept, "tokenizer_class": "PreTrainedTokenizerFast"}
        (temporary / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
        for name in _COPIED:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, temporary / name)
        try:
            temporary.replace(prepared)
        except OSError:
            if not prepared.is_dir():  # another process was first, else
                raise
    except OSError as error:
        raise CheckpointError(f"{prepared} cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return prepared


def _read(file: Path) -> bytes:
    try:
        if (size := file.stat().st_size) > MAX_FILE_BYTES:
            raise CheckpointError(
                f"{file}: expected at most {MAX_FILE_BYTES:,} bytes, got {size:,}"
            )
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer_config.json"
    if not file.exists():
        return {}
    try:
        config = json.loads(_read(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected JSON, got {error!r:.200}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: expected a JSON object")
    return config


def _check_class(folder: Path, config: dict[str, Any]) -> None:
    """Read the text of the class, if it is there; it is never run."""
    files = sorted(folder.glob("tokenization_*.py"))
    if not files and config.get("tokenizer_class") != CLASS_NAME:
        raise CheckpointError(
            f"{folder}: tokenizer_class: expected {CLASS_NAME} beside a {FILE_NAME}, got "
            f"{config.get('tokenizer_class')!r:.100}; use a checkpoint with a tokenizer.json"
        )
    for file in files:
        text = _read(file).decode("utf-8", "replace")
        for split in SPLITS:
            if split not in text:
                raise CheckpointError(
                    f"{file}: expected Kimi's tokenizer, which splits texts by {split!r}; Cenacle "
                    "runs no code of a checkpoint; use one with a tokenizer.json"
                )


def read_ranks(file: Path, listed: bytes) -> list[bytes]:
    """The tokens of a list in which every line is `base64 rank`, by rank.

    Raises:
        CheckpointError: it is not such a list, or ranks or single bytes are missing.
    """
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(listed.splitlines(), 1):
        if not line.strip():
            continue
        try:
            text, rank = line.split()
            token, place = base64.b64decode(text, validate=True), int(rank)
        except ValueError:
            raise CheckpointError(
                f"{file}, line {number}: expected a token in base64 and its rank, got {line[:60]!r}"
            ) from None
        if not 0 < len(token) <= MAX_TOKEN_BYTES or not 0 <= place < MAX_TOKENS or place in ranks:
            raise CheckpointError(
                f"{file}, line {number}: expected a token of 1 to {MAX_TOKEN_BYTES} bytes with a "
                f"rank of its own below {MAX_TOKENS:,}, got {line[:60]!r}"
            )
        ranks[place] = token
    tokens = [ranks[place] for place in sorted(ranks)]
    if len(ranks) != max(ranks, default=-1) + 1 or len(set(tokens)) != len(tokens):
        raise CheckpointError(f"{file}: expected every rank once and every token once")
    if {token for token in tokens if len(token) == 1} != {bytes([byte]) for byte in range(256)}:
        raise CheckpointError(f"{file}: expected all 256 single bytes among the tokens")
    return tokens


def _build(folder: Path, listed: bytes, config: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

    tokens = read_ranks(folder / FILE_NAME, listed)
    known = set(tokens)
    letters = {byte: letter for letter, byte in byte_alphabet().items()}

    def write(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in tokens:  # by rank, as merges are tried
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known:
                merges.append((write(token[:at]), write(token[at:])))
    vocabulary = {write(token): rank for rank, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("|".join(SPLITS)), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    named = _read_added_tokens(folder, config, len(tokens))
    added = []
    for token_id in range(len(tokens), len(tokens) + RESERVED_TOKENS):
        content, special = named.get(token_id, (f"<|reserved_token_{token_id}|>", True))
        added.append(AddedToken(content, special=special, normalized=False))
    if len({token.content for token in added}) != len(added):
        raise CheckpointError(f"{folder}: expected added tokens with names of their own")
    tokenizer.add_tokens(added)
    return tokenizer


def _read_added_tokens(
    folder: Path, config: dict[str, Any], first: int
) -> dict[int, tuple[str, bool]]:
    """Names of the ids behind the list, and whether each is left out of texts."""
    named: dict[int, tuple[str, bool]] = {}
    listed = config.get("added_tokens_decoder") or {}
    problem = CheckpointError(
        f"{folder / 'tokenizer_config.json'}: added_tokens_decoder: expected ids from {first} to "
        f"{first + RESERVED_TOKENS - 1} and objects with a content"
    )
    if not isinstance(listed, dict):
        raise problem
    for key, value in listed.items():
        content = value.get("content") if isinstance(value, dict) else value
        if not key.isascii() or not key.isdigit() or not isinstance(content, str) or not content:
            raise problem
        if not first <= int(key) < first + RESERVED_TOKENS:
            raise problem
        named[int(key)] = content, not isinstance(value, dict) or bool(value.get("special", False))
    return named
