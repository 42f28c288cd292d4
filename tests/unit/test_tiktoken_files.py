"""Tokenizers of a tiktoken list and a Python class, against the plain algorithm."""

import base64
import json
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from cenacle.errors import CheckpointError
from cenacle.text import tiktoken_files
from cenacle.text.detokenizer import byte_alphabet
from cenacle.text.text_backend import load_limited
from cenacle.text.tiktoken_files import SPLITS

DOCS = Path(__file__).parents[2] / "docs"
CLASS = "class TikTokenTokenizer:\n    open('RAN', 'w')\n" + "\n".join(
    f'    r"""{split}"""' for split in SPLITS
)


def train_tokens() -> list[bytes]:
    """Tokens of bytes in the order in which they are joined."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = list(byte_alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1200, initial_alphabet=alphabet, show_progress=False)
    texts = [path.read_text() for path in sorted(DOCS.glob("*.md"))] + [
        "中文字符" * 50,
        "été à" * 50,
    ]
    tokenizer.train_from_iterator(texts, trainer)
    by_id = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    letters = byte_alphabet()
    return [bytes(letters[letter] for letter in token) for token, _ in by_id]


TOKENS = train_tokens()
FIRST_ADDED = len(TOKENS)
CONFIG = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "added_tokens_decoder": {
        str(FIRST_ADDED): {"content": "[BOS]", "special": True},
        str(FIRST_ADDED + 1): {"content": "[EOS]", "special": True},
        str(FIRST_ADDED + 7): {"content": "<|tool_call_begin|>", "special": False},
    },
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "chat_template": "{% for m in messages %}{{ m.content }}[EOS]{% endfor %}",
}


def write_folder(folder: Path, tokens: list[bytes] = TOKENS, **changes: object) -> Path:
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (folder / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({**CONFIG, **changes}))
    (folder / "tokenization_kimi.py").write_text(CLASS)
    return folder


def encode_plainly(text: str) -> list[int]:
    """tiktoken's algorithm: of a piece's bytes, the pair with the lowest rank is joined first."""
    ranks = {token: rank for rank, token in enumerate(TOKENS)}
    ids: list[int] = []
    for match in regex.finditer("(?V1)" + "|".join(SPLITS), text):
        piece = match[0].encode()
        if piece in ranks:
            ids.append(ranks[piece])
            continue
        parts = [bytes([byte]) for byte in piece]
        while True:
            joined = [ranks.get(a + b, len(ranks)) for a, b in pairwise(parts)]
            if min(joined, default=len(ranks)) == len(ranks):
                break
            at = joined.index(min(joined))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_limited(write_folder(tmp_path_factory.mktemp("kimi")), None)


LETTERS = st.text(
    st.one_of(st.sampled_from("aàAÉ中文 \n\r\t.,!'’s12٣éẞǅʰ़́🙂x"), st.characters(codec="utf-8"))
)


@given(LETTERS)
@settings(max_examples=300)
def test_ids_are_those_of_the_plain_algorithm(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids == encode_plainly(text)
    assert tokenizer.decode(ids) == text


def test_documents_and_added_tokens(tokenizer):
    text = (DOCS / "devlog.md").read_text()[:20_000]
    assert tokenizer.encode(text, add_special_tokens=False) == encode_plainly(text)
    marked = tokenizer.encode("a<|tool_call_begin|>b[EOS]", add_special_tokens=False)
    assert marked[1::2] == [FIRST_ADDED + 7, FIRST_ADDED + 1]
    assert tokenizer.convert_ids_to_tokens(FIRST_ADDED + 255).startswith("<|reserved_token_")
    assert tokenizer.eos_token_ids == {FIRST_ADDED + 1}
    chat = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "hi[EOS]"


def test_the_class_is_not_run_and_the_folder_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folder(tmp_path)
    before = sorted(folder.iterdir())
    prepared = tiktoken_files.prepare_folder(folder)
    written = prepared.stat().st_mtime_ns
    assert tiktoken_files.prepare_folder(folder) == prepared
    assert prepared.stat().st_mtime_ns == written
    assert sorted(folder.iterdir()) == before
    changed = write_folder(folder, chat_template="other")
    assert tiktoken_files.prepare_folder(changed) != prepared


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b"", "all 256 single bytes"),
        (b"\x00\xff 1", "line 1: expected a token in base64"),
        (b"YQ== one", "line 1: expected a token in base64"),
        (b"YQ== 0 0", "line 1: expected a token in base64"),
        (b"YQ== -1", "rank of its own"),
        (b"YQ== 99999999999", "rank of its own"),
        (b"YQ== " + b"9" * 5000, "line 1: expected a token in base64"),
        (b"YQ== 0\nYg== 0", "line 2: expected a token of 1 to 512 bytes"),
        (b"YQ== 0\nYg== 2", "every rank once"),
        (b"YQ== 0\nYQ== 1", "every token once"),
        (base64.b64encode(b"a" * 513) + b" 0", "1 to 512 bytes"),
    ],
)
def test_a_damaged_list_is_a_sentence(tmp_path, listed, message):
    folder = write_folder(tmp_path)
    (folder / "tiktoken.model").write_bytes(listed)
    with pytest.raises(CheckpointError, match=message):
        tiktoken_files.prepare_folder(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"added_tokens_decoder": {"3": {"content": "x"}}}, "expected ids from"),
        ({"added_tokens_decoder": {"x": {"content": "x"}}}, "expected ids from"),
        ({"added_tokens_decoder": {str(FIRST_ADDED): {"content": 1}}}, "expected ids from"),
        ({"added_tokens_decoder": [1]}, "expected ids from"),
        (
            {"added_tokens_decoder": {str(FIRST_ADDED + k): {"content": "x"} for k in (1, 2)}},
            "names of their own",
        ),
    ],
)
def test_wrong_added_tokens_are_a_sentence(tmp_path, changes, message):
    with pytest.raises(CheckpointError, match=message):
        tiktoken_files.prepare_folder(write_folder(tmp_path, **changes))


def test_another_class_is_refused(tmp_path):
    folder = write_folder(tmp_path)
    (folder / "tokenization_kimi.py").write_text(CLASS.replace(r"\p{N}{1,3}", r"\p{N}"))
    with pytest.raises(CheckpointError, match="runs no code of a checkpoint"):
        load_limited(folder, None)
    (folder / "tokenization_kimi.py").unlink()
    load_limited(folder, None)
    write_folder(tmp_path, tokenizer_class="Other")
    (folder / "tokenization_kimi.py").unlink()
    with pytest.raises(CheckpointError, match="expected TikTokenTokenizer"):
        load_limited(folder, None)
