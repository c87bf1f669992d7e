"""The program as a user starts it, on the bundled model, without a network."""

import json
import os
import subprocess
import sys


def kvkeep(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "kvkeep.cli.main", *args],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        check=False,
    )


def test_the_demonstration_passes_every_check() -> None:
    """All outputs are those of plain transformers, and what is known is not computed again."""
    done = kvkeep("demo", "--json")

    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    shown = json.loads(done.stdout)
    scenes = {scene["name"]: scene for scene in shown["scenes"]}
    assert list(scenes) == ["cold", "warm", "shared", "chat", "repair"]
    assert shown["passed"] is True
    assert all(scene["tokens_equal"] and scene["gaps_equal"] for scene in scenes.values())
    assert all(scene["output_tokens"] > 0 for scene in scenes.values())
    assert scenes["cold"]["reused_tokens"] == 0
    assert scenes["warm"]["reused_tokens"] > 0.9 * scenes["cold"]["computed_tokens"]
    assert scenes["shared"]["reused_tokens"] > scenes["shared"]["computed_tokens"]
    assert scenes["repair"]["computed_tokens"] < scenes["cold"]["computed_tokens"] / 4


def test_a_conversation_through_a_pipe_reuses_what_was_said() -> None:
    """Answers come on stdout, costs on stderr; the second turn computes only what is new."""
    messages = (
        "What is the secret code of amber river?\n/stats\nAnd again?\n/nothing\n/quit\nunread\n"
    )

    done = kvkeep(
        "chat",
        "--max-tokens",
        "8",
        "--block-size",
        "8",
        "--system",
        "Be brief. " * 20,
        stdin=messages,
    )

    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    first, stats, second, unknown = done.stderr.splitlines()
    assert " 0 reused" in first
    assert "blocks" in stats
    assert " 0 reused" not in second
    assert "/nothing is no command" in unknown
