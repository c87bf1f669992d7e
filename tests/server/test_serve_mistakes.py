"""`kvkeep serve` that cannot come to serve says why once, with the flag, and with the documented code."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def failing(*arguments: str, **env: str) -> tuple[int, list[str]]:
    """Exit code and lines of a program that does not come to serve."""
    command = [sys.executable, "-m", "kvkeep.cli.main", "serve", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
        check=False,
    )
    return done.returncode, done.stderr.strip().splitlines()


def test_a_port_in_use_is_said_before_anything_is_loaded() -> None:
    """One line with the port and what to do, exit code 2."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, lines = failing("--port", str(port))

    assert code == 2, lines
    (line,) = lines
    assert line.startswith(f"error: port={port} of 127.0.0.1 is in use; stop what listens there")
    assert "--port" in line


def test_a_host_of_another_machine_is_named() -> None:
    """It is no traceback either."""
    code, lines = failing("--host", "192.0.2.1", "--api-key", "a-long-enough-key", "--port", "0")

    assert code == 2, lines
    assert lines == [
        "error: host='192.0.2.1' is no address of this machine; give one that is (--host)"
    ]


def test_more_memory_than_there_is_is_exit_code_4() -> None:
    """With the capacity, and no traceback."""
    code, lines = failing("--capacity", "90TB", "--port", "0")

    assert code == 4, lines
    assert lines[-1].startswith("error: capacity='90TB' is more memory than there is on cpu")
    assert not any("Traceback" in line for line in lines)


def test_a_capacity_that_is_no_size_is_said_first_and_with_its_flag() -> None:
    """Nothing is loaded for it."""
    code, lines = failing("--capacity", "much", "--port", "0")

    assert code == 2, lines
    (line,) = lines
    assert line.startswith("error: capacity='much' is not a size")
    assert line.endswith("(from --capacity)")


@pytest.mark.parametrize(
    ("arguments", "field", "flag"),
    [
        (["--drain", "-1"], "drain_s", "--drain"),
        (["--max-body", "lots"], "max_body_bytes", "--max-body"),
        (["--host", "0.0.0.0"], "host", "--host"),  # noqa: S104  which is refused
        (["--block-size", "0"], "block_size", "--block-size"),
    ],
)
def test_errors_name_the_flag_as_well_as_the_field(
    arguments: list[str], field: str, flag: str
) -> None:
    """Fields are what settings files have, flags are what was typed."""
    code, (line,) = failing(*arguments, "--port", "0")

    assert code == 2
    assert line.startswith(f"error: {field}=")
    assert f"(from {flag})" in line


def test_a_mistyped_model_is_one_error(tmp_path: Path) -> None:
    """It is not said before that it is served, nor the same twice."""
    code, lines = failing(str(tmp_path / "nothing-here"), "--port", "0")

    assert code == 2, lines
    assert not any("kvkeep serves" in line for line in lines)
    assert [line for line in lines if "nothing-here" in line and "is being loaded" not in line] == [
        lines[-1]
    ]
    assert lines[-1].startswith("error: model=")


def test_traces_without_their_libraries_are_refused_by_name(tmp_path: Path) -> None:
    """An address that is none, and an extra that is not installed: one line each."""
    # What Python runs first: it finds no such package from then on.
    (tmp_path / "sitecustomize.py").write_text(
        "import sys; sys.modules['opentelemetry.sdk'] = None"
    )
    flag = ("--otlp-endpoint", "http://127.0.0.1:4318", "--port", "0")

    absent, absent_lines = failing(*flag, PYTHONPATH=str(tmp_path))
    wrong, wrong_lines = failing("--otlp-endpoint", "collector", "--port", "0")

    for code, lines in ((absent, absent_lines), (wrong, wrong_lines)):
        assert code == 2, lines
        (line,) = lines
        assert line.startswith("error: otlp_endpoint=")
    assert "pip install 'kvkeep[otel]'" in absent_lines[0]
    assert "http://host:4318" in wrong_lines[0]
