"""`kvkeep cache lint` and `kvkeep config show` on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from kvkeep.cli.main import main

RULES = "Answer in one sentence. Name the source of everything that you say. " * 12


def invoke(*args: str, stdin: str | None = None, **env: str) -> Result:
    """Run the program in this process."""
    return CliRunner().invoke(main, list(args), input=stdin, env=env)


def request_file(folder: Path, name: str, system: str) -> str:
    """A chat request in a file."""
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "Hello?"}]
    (folder / name).write_text(json.dumps({"messages": messages}))
    return str(folder / name)


def test_a_finding_has_place_reason_and_remedy(tmp_path: Path) -> None:
    """Exit code 1 says that something breaks reuse for certain."""
    file = request_file(tmp_path, "one.json", f"It is 14:19:39. {RULES}")

    shown = invoke("cache", "lint", file)
    found = json.loads(invoke("cache", "lint", file, "--json").stdout)["findings"]

    assert shown.exit_code == 1
    assert f"{file}: messages[0].content, character 6: breaks: a time: '14:19:39'" in shown.stdout
    assert "remedy: " in shown.stdout
    assert [one["severity"] for one in found] == ["breaks"]


def test_a_sound_request_is_exit_code_0(tmp_path: Path) -> None:
    """And says so."""
    result = invoke("cache", "lint", request_file(tmp_path, "one.json", RULES))

    assert result.exit_code == 0
    assert "nothing found" in result.stdout


def test_a_second_request_is_compared_with_the_first(tmp_path: Path) -> None:
    """What differs between two requests of one program is certain."""
    one = request_file(tmp_path, "one.json", f"Likes tea. {RULES}")
    two = request_file(tmp_path, "two.json", f"Likes rum. {RULES}")

    result = invoke("cache", "lint", one, two)

    assert result.exit_code == 1
    assert f"{two}: messages[0].content, character 6" in result.stdout


def test_tokens_are_those_of_the_model(tmp_path: Path) -> None:
    """With the bundled model its own tokenizer counts."""
    text = f"It is 14:19:39. {RULES}"
    file = request_file(tmp_path, "one.json", text)

    by_model = json.loads(invoke("cache", "lint", file, "--model", "tiny", "--json").stdout)
    by_length = json.loads(invoke("cache", "lint", file, "--json").stdout)

    tokens = by_model["findings"][0]["tokens_behind"]
    assert tokens != by_length["findings"][0]["tokens_behind"]
    assert len(RULES) // 8 < tokens < len(RULES)


def test_a_template_with_a_date_is_found_in_the_folder_of_the_model(tmp_path: Path) -> None:
    """The template is read from the folder, not run."""
    bundled = Path(__file__).parents[2] / "src/kvkeep/bundled/tiny/tokenizer.json"
    model = tmp_path / "model"
    model.mkdir()
    (model / "tokenizer.json").write_text(bundled.read_text())
    (model / "chat_template.jinja").write_text("{{ strftime_now('%d %b %Y') }}")
    file = request_file(tmp_path, "one.json", RULES)

    result = invoke("cache", "lint", file, "--model", str(model))

    assert result.exit_code == 0
    assert "chat template" in result.stdout


@pytest.mark.parametrize("content", ["", "[1]", "{", "[" * 100_000])
def test_what_is_no_request_is_a_usage_error(content: str) -> None:
    """Exit code 2 and a line that says what is wrong."""
    result = invoke("cache", "lint", "-", stdin=content)

    assert result.exit_code == 2
    assert "Error: " in result.stderr


@pytest.mark.parametrize("content", ["{}", '{"messages": []}', '{"model": "tiny", "message": "a"}'])
def test_a_request_without_prompt_is_a_usage_error(content: str) -> None:
    """It is not called sound; what is missing is named."""
    result = invoke("cache", "lint", "-", stdin=content)

    assert result.exit_code == 2
    assert "has no prompt; a request needs messages, prompt, input" in result.stderr


def test_a_short_system_text_with_a_date_is_exit_code_1(tmp_path: Path) -> None:
    """It breaks reuse as a long one does."""
    result = invoke("cache", "lint", request_file(tmp_path, "one.json", "Today is 2026-11-22."))

    assert result.exit_code == 1
    assert "a date: '2026-11-22'" in result.stdout


def test_a_model_without_tokenizer_is_a_usage_error(tmp_path: Path) -> None:
    """The option is named."""
    file = request_file(tmp_path, "one.json", RULES)

    result = invoke("cache", "lint", file, "--model", str(tmp_path))

    assert result.exit_code == 2
    assert "tokenizer.json" in result.stderr


def shown_settings(*args: str, **env: str) -> dict[str, Any]:
    """What `config show` prints as JSON."""
    result = invoke("config", "show", "--origins", "--json", *args, **env)
    assert result.exit_code == 0, result.output
    return dict(json.loads(result.stdout))


def test_settings_are_shown_with_their_origins(tmp_path: Path) -> None:
    """Flags rule over the environment, that over the file, that over the defaults."""
    file = tmp_path / "kvkeep.toml"
    file.write_text('[engine]\ncapacity = "1GB"\npolicy = "lru"\nblock_size = 8\n')

    shown = shown_settings(
        "--config", str(file), "--block-size", "64", KVKEEP_CAPACITY="3GB", KVKEEP_BLOCK_SIZE="16"
    )

    assert shown["settings"]["block_size"] == 64
    assert shown["origins"]["block_size"] == "--block-size"
    assert shown["settings"]["capacity"] == "3GB"
    assert shown["origins"]["capacity"] == "KVKEEP_CAPACITY"
    assert shown["settings"]["policy"] == "lru"
    assert shown["origins"]["policy"] == f"engine.policy in {file}"
    assert shown["origins"]["mode"] == "default"


def test_settings_are_a_table_without_passwords() -> None:
    """Origins only where they are asked for; what a tier is reached with is not printed."""
    tier = ("--tier", "redis://someone:opensesame@127.0.0.1")

    plain = invoke("config", "show", *tier)
    full = invoke("config", "show", "--origins", *tier)

    assert plain.exit_code == 0
    assert "opensesame" not in plain.stdout + full.stdout
    assert "--tier" not in plain.stdout
    assert "--tier" in full.stdout
    assert "capacity" in plain.stdout


def test_an_unknown_setting_is_named() -> None:
    """Exit code 2, as everywhere."""
    result = invoke("config", "show", KVKEEP_POLICY="newest")

    assert result.exit_code == 2
    assert "KVKEEP_POLICY" in result.stderr


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"messages": "hi"}, "messages='hi' is no list"),
        ({"messages": [{"role": "user"}]}, "messages[0]={'role': 'user'} has no content"),
        ({"messages": ["hi"]}, "messages[0]='hi' has no content"),
        ({"prompt": 5}, "prompt=5 is no prompt"),
    ],
)
def test_what_is_no_prompt_is_not_found_sound(
    request_: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Nothing was looked at in it."""
    (tmp_path / "one.json").write_text(json.dumps(request_))

    result = invoke("cache", "lint", str(tmp_path / "one.json"))

    assert result.exit_code == 2
    assert message in result.stderr
