"""Traces are read line by line, and every wrong line is named."""

from pathlib import Path

import pytest

from kvkeep.errors import ConfigError
from kvkeep.replay import TraceRequest, read_trace, visits_of, write_trace

LINE = '{"timestamp": 0, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]}\n'


def request(
    *ids: int, input_length: int, output_length: int = 1, timestamp_ms: float = 0
) -> TraceRequest:
    """A request with these ids."""
    return TraceRequest(
        timestamp_ms=timestamp_ms,
        input_length=input_length,
        output_length=output_length,
        hash_ids=ids,
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """A file has a line for each request, in the names of the public traces."""
    requests = [
        request(0, 1, 2, input_length=1100, output_length=5),
        request(0, input_length=512, timestamp_ms=30),
        request(input_length=0, timestamp_ms=31),
    ]
    path = tmp_path / "trace.jsonl"

    num_written = write_trace(path, requests)

    assert num_written == 3
    assert read_trace(path) == requests
    first = path.read_text().splitlines()[0]
    assert first == LINE.strip().replace(" ", "")


def test_requests_come_in_order_of_time(tmp_path: Path) -> None:
    """Lines may be in any order, those of one time keep theirs; empty lines and other members pass."""
    path = tmp_path / "trace.jsonl"
    late = LINE.replace('"timestamp": 0', '"timestamp": 7, "chat_id": 3')
    other = LINE.replace("[0, 1, 2]", "[0, 1, 9]")
    path.write_text(late + "\n" + LINE + other)

    requests = read_trace(path)

    assert [one.timestamp_ms for one in requests] == [0, 0, 7]
    assert [one.hash_ids[2] for one in requests] == [2, 9, 2]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "2 is no request"),
        ('{"timestamp": 1}', "2 is no request .*input_length"),
        (LINE.replace("1100", "-1"), "2 is no request .*>= 0"),
        (LINE.replace("[0, 1, 2]", '["a"]'), "2 is no request .*hash_ids"),
        (LINE.replace("1100", "1025.5"), "2 is no request"),
        (LINE.replace("[0, 1, 2]", "[0, 1]"), "2: hash_ids has 2 ids, and input_length=1100 is 3"),
    ],
)
def test_a_wrong_line_is_named(line: str, problem: str, tmp_path: Path) -> None:
    """The error has the file, the number of the line and what is wrong in it."""
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE + line)

    with pytest.raises(ConfigError, match=r"trace\.jsonl:" + problem):
        read_trace(path)


def test_ids_may_stand_for_other_numbers_of_tokens(tmp_path: Path) -> None:
    """The same line has as many ids as it has blocks, whatever their size."""
    path = tmp_path / "trace.jsonl"
    path.write_text(LINE.replace("1100", "41"))

    assert read_trace(path, block_tokens=16)[0].input_length == 41
    with pytest.raises(ConfigError, match="is 1 blocks of 512"):
        read_trace(path)


def test_a_file_that_is_not_there_is_a_setting_error(tmp_path: Path) -> None:
    """Reading and writing name the file and the reason."""
    path = tmp_path / "none" / "trace.jsonl"

    with pytest.raises(ConfigError, match=r"none/trace\.jsonl.*No such file"):
        read_trace(path)
    with pytest.raises(ConfigError, match=r"none/trace\.jsonl.*No such file"):
        write_trace(path, [])


def test_only_full_blocks_have_names() -> None:
    """A partial block of the input has a place and no key; equal ids have equal keys."""
    first, second = visits_of(
        [request(0, 1, 2, input_length=1100), request(0, 1, input_length=1024)], 512
    )

    assert first.num_places == 3
    assert len(first.keys) == len(first.entries) == 2
    assert first.keys == second.keys
    assert first.entries == second.entries
    assert second.num_places == 3
    assert len(second.entries) == 2


def test_a_name_depends_on_all_that_lies_before() -> None:
    """The same id behind other ids is another content."""
    first, second = visits_of(
        [request(0, 5, input_length=1024), request(1, 5, input_length=1024)], 512
    )

    assert first.contents[1] == second.contents[1]
    assert first.keys[1] != second.keys[1]
    assert first.entries[1].parent == first.keys[0]


def test_output_is_content_that_nobody_else_has() -> None:
    """Blocks that hold output follow the input's in the chain, and differ between equal requests."""
    same = request(0, 1, input_length=600, output_length=1000)
    first, second = visits_of([same, same], 512)

    assert first.num_places == 4
    assert len(first.entries) == 3
    assert first.entries[1].parent == first.keys[0] == second.keys[0]
    assert first.entries[2].parent == first.entries[1].key
    assert not {one.key for one in first.entries[1:]} & {one.key for one in second.entries[1:]}
