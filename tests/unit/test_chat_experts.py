"""`/experts` of `cenacle chat`: which experts worked, as lines of blocks."""

from cenacle.cli.chat import MOST_ROUTING_ROWS, ChatSession, draw_routing
from cenacle.cli.chat_sources import ChatSettings


class Source:
    name, context_used, context_length = "some", 0, None

    def routing_counts(self):
        return [[0, 1, 8], [4, 4, 0]]


def test_experts_are_drawn_by_the_busiest_of_their_layer(capsys):
    session = ChatSession(Source(), ChatSettings())
    assert session._handle_line("/experts", str)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["   0   ▁█", "   1  ██ "]


def test_large_models_fit_the_terminal():
    counts = [[expert == 255 for expert in range(256)] for _ in range(60)]
    lines = draw_routing(counts, 40)
    assert len(lines) <= MOST_ROUTING_ROWS + 1
    assert all(len(line) <= 40 and line.endswith("█") for line in lines[:-1])
    assert draw_routing([], 40) == draw_routing([[0, 0]], 40) != []
