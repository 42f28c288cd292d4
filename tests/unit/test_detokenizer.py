"""Text, pieces and bytes of tokens are one, for every kind of tokenizer."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from cenacle.text.detokenizer import Detokenizer, TokenBytes

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
TEXTS = [" Paris", "a b", "\n\nx", "tab\tNUL\0end", "Grüße 中文 \U0001f600!", "  two", "é"]


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_level() -> PreTrainedTokenizerFast:
    """As GPT-2, Qwen and DeepSeek have it; every token is one byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast(tokenizer)


def byte_fallback(*last: decoders.Decoder) -> PreTrainedTokenizerFast:
    """As Llama and Mixtral have it."""
    words = {word: at for at, word in enumerate([*BYTES, "▁", "a", "b", "P", "i", "s", "r"])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[], byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    tokenizer.decoder = decoders.Sequence(steps)
    return fast(tokenizer)


def metaspace() -> PreTrainedTokenizerFast:
    """A decoder that mlx-lm reads by decoding again and again."""
    letters = dict.fromkeys([*"".join(TEXTS), "▁"])
    tokenizer = Tokenizer(models.BPE(vocab={w: at for at, w in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return fast(tokenizer)


TOKENIZERS = {
    "byte level": byte_level(),
    "byte fallback, first space stripped": byte_fallback(decoders.Strip(" ", 1, 0)),
    "byte fallback": byte_fallback(),
    "metaspace": metaspace(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text(kind, text):
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode(text, add_special_tokens=False)
    token_bytes = TokenBytes(tokenizer)
    assert b"".join(token_bytes[token] for token in tokens).decode() == text
    stream = Detokenizer(token_bytes)
    pieces = [stream.add(token) for token in tokens]
    assert "".join(pieces) + stream.finish() == text
    assert "\ufffd" not in "".join(pieces)


def test_what_is_no_token_has_no_text():
    token_bytes = TokenBytes(TOKENIZERS["byte level"])
    assert (token_bytes[10**6], token_bytes[2**40]) == (b"", b"")


def test_half_a_character_is_replaced_at_the_end():
    stream = Detokenizer({1: b"a\xf0\x9f", 2: b"\x98\x80", 3: b"b"})
    assert [stream.add(1), stream.add(3)] == ["a", "\ufffdb"]
    assert [stream.add(1), stream.finish()] == ["a", "\ufffd"]
    assert [Detokenizer({2: b"\x98\x80"}).add(2)] == ["\ufffd\ufffd"]


def test_words_that_continue_are_joined():
    """WordPiece's decoder is known by its differences only."""
    vocabulary = {"[UNK]": 0, "a": 1, "##b": 2, "c": 3}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    token_bytes = TokenBytes(fast(tokenizer))
    assert [token_bytes[1], token_bytes[2], token_bytes[3]] == [b" a", b"b", b" c"]
