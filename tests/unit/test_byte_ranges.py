"""Byte ranges, compared with sets of numbers."""

import json
import random

import pytest

from cenacle.model.byte_ranges import (
    ColumnRange,
    append_range,
    byte_range_from_json,
    covering_spans,
    intersect_spans,
    is_valid,
    merge_spans,
    subtract_spans,
    total_bytes,
)


def numbers(spans):
    return {n for start, stop in spans for n in range(start, stop)}


def some(draw, count):
    starts = [draw.randrange(100) for _ in range(count)]
    return [(a, a + draw.randrange(1, 20)) for a in starts]


@pytest.mark.parametrize("seed", range(50))
def test_spans_add_and_subtract_as_sets_do(seed):
    draw = random.Random(seed)
    one, other = some(draw, draw.randrange(6)), some(draw, draw.randrange(6))
    assert numbers(merge_spans(one)) == numbers(one)
    assert all(
        b < c for (_, b), (c, _) in zip(merge_spans(one), merge_spans(one)[1:], strict=False)
    )
    assert numbers(subtract_spans(one, merge_spans(other))) == numbers(one) - numbers(other)
    assert numbers(intersect_spans(one, other)) == numbers(one) & numbers(other)


def test_columns_are_extracted_and_located():
    columns = ColumnRange(30, 60, 10, ((1, 3), (7, 10)))
    data = bytes(range(100))
    taken = columns.extract(data[30:60])
    assert columns.nbytes == total_bytes([columns]) == len(taken) == 15
    assert list(taken) == [n for n in range(30, 60) if n % 10 in (1, 2, 7, 8, 9)]
    assert b"".join(data[a:b] for a, b in columns.spans()) == taken
    parts = list(columns.split(25))
    assert [(p.start, p.stop) for p in parts] == [(30, 50), (50, 60)]
    assert [p.stop - p.start for p in columns.split(3)] == [10, 10, 10], "a row at least"
    assert covering_spans([columns, (60, 70), (0, 5)]) == [(0, 5), (30, 70)]


def test_neighbors_of_one_kind_are_merged():
    wanted = []
    columns = ColumnRange(20, 40, 10, ((0, 5),))
    for more in (
        (0, 10),
        (10, 20),
        columns,
        columns._replace(start=40, stop=50),
        (50, 50),
        (60, 70),
    ):
        append_range(wanted, more)
    other = ColumnRange(70, 80, 5, ((0, 2),))
    append_range(wanted, other)
    append_range(wanted, ColumnRange(80, 100, 10, ((0, 2),)))
    assert wanted == [
        (0, 20),
        columns._replace(stop=50),
        (60, 70),
        other,
        ColumnRange(80, 100, 10, ((0, 2),)),
    ]


def test_json_round_trip_and_invalid_ranges():
    for good in ((3, 9), ColumnRange(30, 60, 10, ((1, 3), (7, 10)))):
        read = byte_range_from_json(json.loads(json.dumps(good)))
        assert read == good
        assert type(read) is type(good)
        assert is_valid(read)
    for bad in ([1], [1, 2, 3], [1, 2, 3, 4], ["a", 2], None, [0, 10, 5, [[1]]]):
        with pytest.raises((TypeError, ValueError)):
            byte_range_from_json(bad)
    columns = ColumnRange(30, 60, 10, ((1, 3), (7, 10)))
    for bad in (
        (5, 5),
        (-1, 5),
        columns._replace(row_bytes=0),
        columns._replace(stop=61),
        columns._replace(columns=()),
        columns._replace(columns=((7, 10), (1, 3))),
        columns._replace(columns=((1, 11),)),
        columns._replace(columns=((-1, 3),)),
    ):
        assert not is_valid(bad)
