"""Files of chains that somebody has tampered with: refused with a reason, and nothing of theirs is kept."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvkeep import LLM, SamplingParams
from kvkeep.errors import CorruptBlockError
from kvkeep.testing.tiny_models import build_tiny

PROMPT = list(range(10, 50))
Header = dict[str, Any]


@pytest.fixture
def llm() -> Iterator[LLM]:
    """An engine over a tiny model."""
    with LLM(build_tiny("llama"), block_size=8, capacity="4MB", calibration_folder=None) as llm:
        yield llm


@pytest.fixture
def exported(llm: LLM, tmp_path: Path) -> Path:
    """What is known of a prompt; the engine does not know it any more."""
    path = tmp_path / "chains.safetensors"
    llm.generate([PROMPT], SamplingParams(max_tokens=1))
    llm.cache.export(path, [PROMPT])
    llm.cache.clear()
    return path


def with_header(path: Path, change: Callable[[Header], None]) -> None:
    """Rewrite the header of a file and leave its data."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def tensors_of(header: Header) -> list[dict[str, Any]]:
    """What the header says of each tensor."""
    return [one for name, one in header.items() if name != "__metadata__"]


@pytest.mark.parametrize(("dtype", "num_bytes"), [("BF16", 2), ("F8_E4M3", 1), ("U16", 2)])
def test_other_numbers_than_bytes_are_refused(
    llm: LLM, exported: Path, dtype: str, num_bytes: int
) -> None:
    """Those that numpy does not have, and those that it has."""

    def change(header: Header) -> None:
        for one in tensors_of(header):
            one["dtype"] = dtype
            one["shape"] = [one["shape"][0] // num_bytes]

    with_header(exported, change)

    with pytest.raises(CorruptBlockError, match=f"dtype='{dtype}'"):
        llm.cache.import_(exported)
    assert llm.cache.coverage(PROMPT).known_tokens == 0


def test_other_shapes_than_rows_are_refused(llm: LLM, exported: Path) -> None:
    """As many bytes, in two dimensions."""

    def change(header: Header) -> None:
        for one in tensors_of(header):
            one["shape"] = [2, one["shape"][0] // 2]

    with_header(exported, change)

    with pytest.raises(CorruptBlockError, match="2 dimensions"):
        llm.cache.import_(exported)


def test_a_block_that_is_named_twice_is_refused(llm: LLM, exported: Path) -> None:
    """One block may stand in the file a million times: none of it is looked at."""

    def change(header: Header) -> None:
        manifest = json.loads(header["__metadata__"]["kvkeep"])
        manifest["blocks"] += [manifest["blocks"][0]]
        header["__metadata__"]["kvkeep"] = json.dumps(manifest)

    with_header(exported, change)

    with pytest.raises(CorruptBlockError, match="names 6 blocks, of which 5 differ"):
        llm.cache.import_(exported)
    assert llm.cache.coverage(PROMPT).known_tokens == 0


def test_a_file_as_it_was_written_is_taken(llm: LLM, exported: Path) -> None:
    """A header that is only written anew changes nothing."""
    with_header(exported, lambda _: None)

    assert llm.cache.import_(exported).num_added == len(PROMPT) // 8
