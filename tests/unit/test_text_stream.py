"""Pieces of a stream, joined, are the text before the first stop string."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cenacle.text.detokenizer import Detokenizer
from cenacle.text.output_parser import OutputParser, StopStringFilter, TextStream

SILENT = 0


def detokenizer_of(words):
    """Token n is `words[n - 1]`; a stop token has no entry and must not reach it."""
    data = [word if isinstance(word, bytes) else word.encode() for word in words]
    return Detokenizer(dict(enumerate(data, 1)))


def pieces(words, stop=(), end=True):
    stream = TextStream(detokenizer_of(words), stop, (SILENT,))
    pieces = [stream.add(i + 1) for i in range(len(words))]
    return [*pieces, stream.finish()] if end else pieces, stream


def text_before(text: str, stop) -> str:
    """The slow reference."""
    return text[: min((at for s in stop if s and (at := text.find(s)) >= 0), default=len(text))]


few = st.text("abc", max_size=4)


@given(st.lists(few, max_size=8), st.lists(few, max_size=3))
def test_joined_pieces_are_the_text_before_the_first_stop_string(words, stop):
    got, stream = pieces(words, stop)
    text = "".join(words)
    # The first complete stop string ends the output.
    ends = [i for i in range(len(words) + 1) if any(s and s in "".join(words[:i]) for s in stop)]
    seen = "".join(words[: ends[0]]) if ends else text
    assert "".join(got) == text_before(seen, stop)
    assert stream.stopped == bool(ends)
    for i in range(len(got)):
        assert text.startswith("".join(got[: i + 1])), "a piece cannot be taken back"


@pytest.mark.parametrize(
    ("words", "stop", "expected"),
    [
        (["Hello", " ", "world"], (), ["Hello", " ", "world", ""]),
        (["a<|", "en", "d|>b"], ["<|end|>"], ["a", "", "", ""]),
        (["a<|", "en", "d>b"], ["<|end|>"], ["a", "", "<|end>b", ""]),
        (["a<", "<", "|"], ["<|"], ["a", "<", "", ""]),
        (["x", "a", "a"], ["aab"], ["x", "", "", "aa"]),
        (["aab", "aac"], ["aabaac"], ["", "", ""]),
        (["aabaa", "baac"], ["aabaac"], ["", "aab", ""]),
        (["1\n", "2\n", "\n3"], ["\n\n", "\nx"], ["1", "\n2", "", ""]),
        (["ab", "cd"], ["cd", "bc"], ["a", "", ""]),
        (["ab"], [""], ["ab", ""]),
        (["stop here"], ["stop"], ["", ""]),
    ],
)
def test_hold_back(words, stop, expected):
    assert pieces(words, stop)[0] == expected


@given(st.lists(few, max_size=8), st.lists(few, max_size=3), st.integers(0, 8))
def test_the_filter_is_the_slow_one(words, stop, first):
    """The filter against one that looks at all of the text each time."""
    stops, filtered, sent, text = [s for s in stop if s], StopStringFilter(stop), "", ""
    for at, word in enumerate(words):
        may_end = at >= first
        ends = range(len(text) + 1, len(text) + len(word) + 1) if may_end else ()
        text += word
        found = [(e - len(s), s) for e in ends for s in stops if text[:e].endswith(s)]
        sent += filtered.add(word, may_end=may_end)
        if found:
            assert (len(sent), filtered.stop_string) == min(found)
            return
        beginnings = [s[:n] for s in stops for n in range(1, len(s))]
        held = max((len(b) for b in beginnings if text.endswith(b)), default=0)
        assert sent == text[: len(text) - held]
    assert sent + filtered.finish() == text
    assert filtered.stop_string is None


def test_long_stop_strings_take_linear_time():
    """A stop string of 1 MB, and text that nearly is one; quadratic work would take hours."""
    length = 1_000_000
    filtered, control_s = (
        StopStringFilter(["a" * length + "b"]),
        time_of(lambda: count("a" * length)),
    )
    taken_s = time_of(lambda: [filtered.add("a" * 1000) for _ in range(2 * length // 1000)])
    assert taken_s < 1000 * control_s
    assert filtered.add("b") == ""
    assert filtered.stop_string is not None


def time_of(function):
    began = time.process_time()
    function()
    return time.process_time() - began


def count(text):
    return sum(letter == "a" for letter in text)


def test_nothing_comes_after_a_stop_string():
    stream = TextStream(detokenizer_of(["ab", "cd"]), ["b"], ())
    assert [stream.add(1), stream.add(2), stream.finish()] == ["a", "", ""]
    assert stream.stopped


def test_stop_tokens_have_no_text():
    stream = TextStream(detokenizer_of(["a"]), (), (SILENT,))
    assert [stream.add(1), stream.add(SILENT), stream.finish()] == ["a", "", ""]
    assert not stream.stopped


def test_no_piece_ends_inside_a_character():
    euro = "€".encode()
    assert pieces([b"a" + euro[:1], euro[1:2], euro[2:]])[0] == ["a", "", "€", ""]
    assert pieces([b"a" + euro[:2]])[0] == ["a", "\ufffd"]


def test_stop_string_that_ends_only_with_the_last_character():
    got, stream = pieces(["a", "€".encode()[:2]], ["\ufffd"])
    assert ("".join(got), stream.stopped) == ("a", True)


def test_end_gives_what_was_held_back_in_order():
    got, stream = pieces(["a", "€".encode()[:2]], ["ab", "\ufffdz"])
    assert (got, stream.stopped) == (["", "", "a\ufffd"], False)


@given(st.lists(few, max_size=8), st.lists(few, max_size=3), st.integers(0, 8))
def test_no_stop_string_ends_within_min_tokens(words, stop, min_tokens):
    parser = OutputParser(detokenizer_of(words), stop, (SILENT,))
    parser.min_tokens = min_tokens
    parts = [part for i in range(len(words)) for part in parser.add(i + 1)]
    got = "".join(part.text for part in parts + parser.finish())
    # The slow reference: the first match in the text so far that ends behind the free part.
    free, text = len("".join(words[:min_tokens])), ""
    for word in words:
        text += word
        starts = [
            at
            for s in stop
            for at in range(len(text))
            if s and text.startswith(s, at) and at + len(s) > free
        ]
        if starts:
            text = text[: min(starts)]
            break
    assert got == text


@pytest.mark.parametrize(
    ("min_tokens", "expected"), [(0, "a"), (1, "a"), (2, "ab-c"), (3, "ab-c"), (4, "ab-cb-")]
)
def test_a_stop_string_counts_after_min_tokens(min_tokens, expected):
    parser = OutputParser(detokenizer_of(["ab", "-", "c", "b-"]), ["b-"], (SILENT,))
    parser.min_tokens = min_tokens
    parts = [part for token in (1, 2, 3, 4) for part in parser.add(token)]
    assert "".join(part.text for part in parts + parser.finish()) == expected
