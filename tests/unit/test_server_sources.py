"""Settings of a server, and prompts that it warms, from a file, the environment and flags."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from kvkeep.cli.config_show import config
from kvkeep.cli.main import main
from kvkeep.config import EngineSettings
from kvkeep.config.fields import field_kinds
from kvkeep.config.server import ServerSettings, server_kinds
from kvkeep.config.warm import WarmPrompt
from kvkeep.errors import ConfigError
from tests.given_settings import load

SERVED = """
[server]
host = "localhost"
port = 0
api_keys = ["one-long-key", "another-key"]
max_body_bytes = "16MB"
request_timeout_s = "10m"
drain_s = 5
contexts_file = "/x/contexts"
allowed_origins = ["https://a.example"]
"""


def make(values: Mapping[str, Any]) -> ServerSettings:
    """The settings of a server with these values."""
    return ServerSettings(**values)


def test_settings_of_a_server_come_from_the_same_places(tmp_path: Path) -> None:
    """Each value as its field has it, and with its origin."""
    environment = {
        "KVKEEP_DRAIN_S": "1m",
        "KVKEEP_API_KEYS": "key-one,odd key-two-two",
        "KVKEEP_MODEL_NAMES": "a,b",
        "KVKEEP_OPEN_METRICS": "yes",
    }

    loaded = load(SERVED, environment, tmp_path, max_body_bytes="1KB")

    assert loaded.server == {
        "host": "localhost",
        "port": 0,
        "api_keys": ("key-one,odd", "key-two-two"),
        "max_body_bytes": 1000,
        "request_timeout_s": 600.0,
        "drain_s": 60.0,
        "contexts_file": Path("/x/contexts"),
        "allowed_origins": ("https://a.example",),
        "model_names": ("a", "b"),
        "open_metrics": True,
    }
    assert make(loaded.server).drain_s == 60.0
    origins = {name: str(origin) for name, origin in loaded.name_to_origin.items()}
    assert origins["host"] == f"server.host in {tmp_path / 'kvkeep.toml'}"
    assert origins["api_keys"] == "KVKEEP_API_KEYS"
    assert origins["max_body_bytes"] == "--max-body-bytes"
    assert origins["admin_key"] == "default"


def test_no_field_is_one_of_an_engine_and_of_a_server() -> None:
    """A variable has one meaning."""
    assert not set(server_kinds()) & {*field_kinds(EngineSettings), "tiers"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[server]\nprot = 1", r"prot in \[server\] of .*did you mean port"),
        ("[server]\nport = '1'", "port='1' is no whole number.*from server.port"),
        ("[server]\ndrain_s = 'never'", "drain_s='never' has no end.*from server.drain_s"),
        ("[server]\nmax_body_bytes = '5 apples'", "max_body_bytes='5 apples' is not a size"),
        ("[server]\nadmin_key = 1234567890", "admin_key is no text"),
        ("[server]\nwarm = 3", r"warm in \[server\]"),
        ("server = 3", "server=3 in .* is no table"),
    ],
)
def test_a_setting_of_a_server_that_cannot_be_is_named(
    text: str, message: str, tmp_path: Path
) -> None:
    """Field, value, remedy, and the place in the file."""
    with pytest.raises(ConfigError, match=message):
        load(text, folder=tmp_path)


@pytest.mark.parametrize(
    ("text", "secret"),
    [("api_keys = ['hidden-one', 3]", "hidden-one"), ("admin_key = 1234567890", "1234567890")],
)
def test_errors_do_not_repeat_keys(text: str, secret: str, tmp_path: Path) -> None:
    """They may end in logs."""
    with pytest.raises(ConfigError) as error:
        load(f"[server]\n{text}", folder=tmp_path)

    assert secret not in str(error.value)


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting() -> None:
    """Its variables are there in every container; an address is no port."""
    links = {
        "KVKEEP_SERVICE_HOST": "10.0.0.1",
        "KVKEEP_SERVICE_PORT_HTTP": "8010",
        "KVKEEP_PORT": "tcp://10.0.0.1:8010",
        "KVKEEP_PORT_8010_TCP_ADDR": "10.0.0.1",
        "KVKEEP_STORE_PORT": "tcp://10.0.0.2:6379",
    }

    assert load(environment=links).server == {}
    assert load(environment={"KVKEEP_PORT": "8011"}).server == {"port": 8011}
    with pytest.raises(ConfigError, match="KVKEEP_SERVICES_HOST"):
        load(environment={"KVKEEP_SERVICES_HOST": "x"})


def warm(text: str, folder: Path) -> list[WarmPrompt]:
    """What the [[warm]] tables of a file mean."""
    return [one for table in load(text, folder=folder).warm for one in table.prompts()]


def test_prompts_to_warm_are_texts_requests_and_catalogues(tmp_path: Path) -> None:
    """Files lie where the settings do; what a line says itself overrules its table."""
    (tmp_path / "law.txt").write_text("The law.")
    (tmp_path / "chat.json").write_text('{"model": "m", "messages": [{"role": "system"}]}')
    lines = ['{"name": "a", "prompt": "A", "ttl": 5}', "", '{"name": "b", "prompt": [1, 2]}']
    (tmp_path / "all.jsonl").write_text("\n".join(lines))
    text = """
        [[warm]]
        file = "law.txt"
        pin = true
        [[warm]]
        name = "chat"
        file = "chat.json"
        [[warm]]
        file = "all.jsonl"
        ttl = "7d"
        tags = ["catalogue"]
        [[warm]]
        name = "inline"
        prompt = "Text."
        salt = "s"
    """

    found = warm(text, tmp_path)

    assert found == [
        WarmPrompt(name="law", fields={"prompt": "The law.", "pin": True}),
        WarmPrompt(name="chat", fields={"messages": [{"role": "system"}]}),
        WarmPrompt(name="a", fields={"prompt": "A", "ttl": 5, "tags": ["catalogue"]}),
        WarmPrompt(name="b", fields={"token_ids": [1, 2], "ttl": "7d", "tags": ["catalogue"]}),
        WarmPrompt(name="inline", fields={"prompt": "Text.", "salt": "s"}),
    ]
    assert found[3].place == f"{tmp_path / 'all.jsonl'}, line 3"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'a'\nfile = 'none.txt'", "none.txt' cannot be read.*number 1 in"),
        ("name = 'a'\nprompt = 'b'\nfile = 'c'", "file and prompt are given"),
        ("name = 'a'", "has no prompt"),
        ("name = 'a'\nprompt = 'b'\ntoken_ids = [1]", "prompt and token_ids are given"),
        ("name = 'a'\nprompt = 3", "prompt=3 is no text"),
        ("name = 'a'\nmessages = ['b']", "messages=.* is no list of messages"),
        ("name = 'a'\ntoken_ids = [true]", "token_ids=.* is no list of whole numbers"),
        ("prompt = 'a'", "name is missing"),
        ("name = 3\nprompt = 'a'", "name=3 is no name"),
        ("name = 'a'\nfile = 3", "file=3 is no path"),
        ("name = 'a'\nprompts = 'a'", "prompts in .*did you mean prompt"),
        ("file = 'bad.jsonl'", r"bad.jsonl, line 2 is no JSON.*\[\[warm\]\] number 1"),
        ("file = 'nameless.jsonl'", "nameless.jsonl, line 1 has no name"),
        ("name = 'a'\nfile = 'nameless.jsonl'", "prompts of .* have their own"),
    ],
)
def test_a_prompt_to_warm_that_cannot_be_is_named(text: str, message: str, tmp_path: Path) -> None:
    """With its place, before anything is loaded."""
    (tmp_path / "bad.jsonl").write_text('{"name": "a", "prompt": "A"}\n{')
    (tmp_path / "nameless.jsonl").write_text('{"prompt": "A"}')

    with pytest.raises(ConfigError, match=message):
        warm(f"[[warm]]\n{text}", tmp_path)


def test_other_commands_do_not_read_what_a_server_is_to_warm(tmp_path: Path) -> None:
    """A file that is not there is no error of theirs."""
    assert len(load("[[warm]]\nname = 'a'\nfile = 'none.txt'", folder=tmp_path).warm) == 1


def show(*arguments: str) -> str:
    """What `kvkeep config show` prints."""
    result = CliRunner().invoke(config, ["show", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_settings_are_shown_without_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many there are, where they are from, and what flags are called."""
    path = tmp_path / "kvkeep.toml"
    path.write_text(SERVED + "[[warm]]\nname = 'law'\nprompt = 'x'\n")
    monkeypatch.setenv("KVKEEP_ADMIN_KEY", "sesame-sesame")

    arguments = ("--origins", "--json", "--config", str(path), "--max-body", "1KB")
    text = show(*arguments, "--share-between-keys")
    shown = json.loads(text)

    assert shown["settings"]["api_keys"] == ["***", "***"]
    assert shown["settings"]["admin_key"] == "***"
    assert shown["settings"]["max_body_bytes"] == 1000
    assert shown["settings"]["contexts_file"] == "/x/contexts"
    assert shown["settings"]["warm"] == ["law"]
    assert shown["origins"]["max_body_bytes"] == "--max-body"
    assert shown["origins"]["isolate_keys"] == "--share-between-keys"
    assert shown["origins"]["admin_key"] == "KVKEEP_ADMIN_KEY"
    assert shown["origins"]["warm"] == f"warm in {path}"
    assert "one-long-key" not in text + show("--config", str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ttl = 'soon'", "ttl='soon' is no length of time"),
        ("ttl = 0", "ttl=0 keeps nothing"),
        ("tags = 'x'", r"tags='x' is no list; write \["),
        ("tags = ['']", "tags='' is no name"),
        ("pin = 'yes'", "pin='yes' is neither true nor false"),
        ("salt = 3", "salt=3 is no text"),
    ],
)
def test_how_a_prompt_is_kept_is_looked_at_when_settings_are_read(
    text: str, message: str, tmp_path: Path
) -> None:
    """Not when the model is there and the server runs without it."""
    with pytest.raises(ConfigError, match=rf"{message}.*\(in \[\[warm\]\] number 1 in"):
        load(f"[[warm]]\nname = 'a'\nprompt = 'b'\n{text}", folder=tmp_path)


def test_a_text_for_a_list_of_names_is_told_how_to_be_one(tmp_path: Path) -> None:
    """As TOML writes it."""
    with pytest.raises(ConfigError, match=r'model_names=.a. is no list of names; write \["a"\]'):
        load("[server]\nmodel_names = 'a'", folder=tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"allowed_origins": ("foo",)}, "allowed_origins has 'foo'"),
        ({"model_names": ("",)}, "model_names has ''"),
    ],
)
def test_names_that_no_request_can_have_are_refused(changes: dict[str, Any], message: str) -> None:
    """They would never match."""
    with pytest.raises(ConfigError, match=message):
        make(changes)
    assert make({"allowed_origins": ("*", "null", "http://localhost:3000")}).allowed_origins


@pytest.mark.parametrize("text", ["", "# a remark\n\n   \n"])
def test_a_file_without_key_opens_no_server(text: str, tmp_path: Path) -> None:
    """Who gives a file wants keys to be asked for."""
    path = tmp_path / "keys"
    path.write_text(text)
    for arguments in (["config", "show"], ["serve", "--port", "0"]):
        result = CliRunner().invoke(main, [*arguments, "--api-keys-file", str(path)])
        assert result.exit_code == 2
        assert f"api_keys_file='{path}' has no key" in result.stderr


def test_keys_of_a_file_are_from_that_flag(tmp_path: Path) -> None:
    """Not from the one for a single key."""
    (tmp_path / "keys").write_text("a-long-key # remark")
    keys = ("--api-keys-file", str(tmp_path / "keys"), "--origins", "--json")

    assert json.loads(show(*keys))["origins"]["api_keys"] == "--api-keys-file"
    both = json.loads(show("--api-key", "another-key", *keys))["origins"]["api_keys"]
    assert both == "--api-key, --api-keys-file"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[tiers]]\nkind = 'disc'", "tier='disc' is not known; did you mean disk?"),
        ("[[tiers]]\nkind = 'disk'\ncapacity = '1GB'", "folder is missing"),
        ("[[tiers]]\nkind = 'host'\ncapacity = '1GB'\nfoo = 1", "foo is no option of the tier"),
        ("[[warm]]\nname = 'a'", "has no prompt"),
        ("[[warm]]\nname = 'a'\nprompt = 'b'\nmessages = []", "messages and prompt are given"),
        ("[server]\napi_keys = ['short']", "has a key of 5 characters"),
        ("tiers = ['host:1GB?name=a', 'host:2GB?name=a']", "name='a' is given to 2 tiers"),
    ],
)
def test_config_show_refuses_what_serve_refuses(text: str, message: str, tmp_path: Path) -> None:
    """In one line, with the place."""
    path = tmp_path / "kvkeep.toml"
    path.write_text(text)

    result = CliRunner().invoke(main, ["config", "show", "--config", str(path)])

    assert result.exit_code == 2
    assert message in result.stderr
    assert str(path) in result.stderr or "key of" in result.stderr


def test_tiers_are_shown_as_they_are_written_and_nothing_is_made(tmp_path: Path) -> None:
    """As an object in JSON; without passwords in both."""
    folder = tmp_path / "disk"
    written = f"disk:{folder}:1GB?durable=true"
    store = "redis://anna:sesame@store:6379/0?timeout_s=1"

    arguments = ("--tier", written, "--tier", store)
    shown, text = json.loads(show("--json", *arguments)), show(*arguments)

    assert shown["settings"]["tiers"] == [
        {"kind": "disk", "folder": str(folder), "capacity": "1GB", "durable": "true"},
        {"kind": "redis", "url": "redis://anna:***@store:6379/0?timeout_s=1"},
    ]
    assert f"{written}, redis://anna:***@store:6379/0?timeout_s=1" in text
    assert list(tmp_path.iterdir()) == []
