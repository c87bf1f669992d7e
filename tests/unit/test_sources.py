"""Flags overrule the environment, that a file, that the defaults; and every value knows where it is from."""

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kvkeep.cli.tier_options import load_given, tier_options, tiers_of
from kvkeep.config import EngineSettings
from kvkeep.config.sources import LoadedSettings, Origin, Source, load_settings
from kvkeep.config.tier_tables import TierTable
from kvkeep.errors import ConfigError
from kvkeep.tiers.settings import Disk, Host, Remote
from tests.given_settings import load

DOCUMENT = """
[engine]
capacity = "3GB"
block_size = 16
kv_exact_layers = [0, 1]
kv_exact_first_block = true

[[tiers]]
kind = "disk"
folder = "/x"
capacity = "50GB"
write_on = ["idle"]
"""


def test_with_nothing_said_everything_is_the_default() -> None:
    """And each value says that it is."""
    loaded = load()

    assert loaded.engine == EngineSettings()
    assert loaded.tiers == ()
    assert set(loaded.name_to_origin.values()) == {Origin(Source.DEFAULT)}
    assert {"capacity", "tiers"} <= set(loaded.name_to_origin)
    assert str(loaded.name_to_origin["capacity"]) == "default"


def test_a_later_source_overrules_an_earlier_one(tmp_path: Path) -> None:
    """Value by value; the tiers as a whole."""
    environment = {
        "KVKEEP_CAPACITY": "4GB",
        "KVKEEP_MAX_REQUESTS": "7",
        "KVKEEP_TIERS": "host:1GB",
        "HOME": "/",
    }

    loaded = load(DOCUMENT, environment, tmp_path, capacity="5GB", mode="native")

    assert loaded.engine == EngineSettings(
        capacity="5GB", block_size=16, max_requests=7, mode="native",
        kv_exact_layers=(0, 1), kv_exact_first_block=True,
    )  # fmt: skip
    assert loaded.tiers == (TierTable("host", {"capacity": "1GB"}),)
    origins = {name: str(origin) for name, origin in loaded.name_to_origin.items()}
    assert origins["capacity"] == "--capacity"
    assert origins["max_requests"] == "KVKEEP_MAX_REQUESTS"
    assert origins["tiers"] == "KVKEEP_TIERS"
    assert origins["block_size"] == f"engine.block_size in {tmp_path / 'kvkeep.toml'}"
    assert origins["poison"] == "default"
    assert loaded.name_to_origin["mode"] == Origin(Source.FLAG, "--mode")


def test_tiers_of_a_file_are_tables_or_texts(tmp_path: Path) -> None:
    """Both say the same."""
    tables = load(DOCUMENT, folder=tmp_path).tiers
    texts = load('tiers = ["host:4GB", "redis://h?ttl_s=1"]', folder=tmp_path).tiers

    assert tables == (
        TierTable("disk", {"folder": "/x", "capacity": "50GB", "write_on": ["idle"]}),
    )
    assert [table.kind for table in texts] == ["host", "redis"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("none", None), ("4096", 4096), (" 12 ", 12)],
)
def test_text_in_the_environment_has_the_type_of_its_field(text: str, value: int | None) -> None:
    """Numbers, none, words, lists."""
    assert load(environment={"KVKEEP_MAX_CONTEXT": text}).engine.max_context == value


@pytest.mark.parametrize(
    ("text", "value"), [("auto", "auto"), ("0,1", (0, 1)), ("", ()), ("5", (5,))]
)
def test_layers_in_the_environment_are_a_list_or_a_word(text: str, value: object) -> None:
    """Of the types that a field may have, the one that the text can be read as."""
    assert load(environment={"KVKEEP_KV_EXACT_LAYERS": text}).engine.kv_exact_layers == value


@pytest.mark.parametrize(
    ("text", "value"), [("yes", True), ("TRUE", True), ("1", True), ("off", False), ("0", False)]
)
def test_truth_in_the_environment_is_written_in_several_ways(text: str, *, value: bool) -> None:
    """As people write it."""
    assert load(environment={"KVKEEP_SELF_TEST": text}).engine.self_test is value


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"KVKEEP_CAPCITY": "1"},
            "KVKEEP_CAPCITY in the environment .*did you mean KVKEEP_CAPACITY",
        ),
        (
            {"KVKEEP_BLOCK_SIZE": "big"},
            r"block_size='big' is no whole number.*from KVKEEP_BLOCK_SIZE",
        ),
        ({"KVKEEP_BLOCK_SIZE": "0"}, r"block_size=0 is not.*\(from KVKEEP_BLOCK_SIZE\)"),
        ({"KVKEEP_SELF_TEST": "perhaps"}, "self_test='perhaps' is no true or false"),
        ({"KVKEEP_TIERS": "host"}, r"host.*capacity.*\(from KVKEEP_TIERS\)"),
        ({"KVKEEP_CONFIG": "/nowhere.toml"}, "config='/nowhere.toml' cannot be read"),
    ],
)
def test_a_variable_that_cannot_be_is_named(environment: dict[str, str], message: str) -> None:
    """Field, value, remedy, and the variable."""
    with pytest.raises(ConfigError, match=message):
        load(environment=environment)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engin]", "engin in .*did you mean engine"),
        ("[engine]\nblock_sise = 3", r"block_sise in \[engine\] of .*did you mean block_size"),
        (
            "[engine]\nblock_size = '32'",
            "block_size='32' is no whole number.*from engine.block_size",
        ),
        ("[engine]\nblock_size = true", "block_size=True is no whole number"),
        ("[engine]\nblock_size = -1", r"block_size=-1 is not.*\(from engine.block_size in"),
        ("[engine]\npoison = 1", "poison=1 is no true or false"),
        ("[engine]\nkv_exact_layers = ['a']", "kv_exact_layers=.* is no"),
        ("engine = 3", "engine=3 in .* is no table"),
        ("[tiers]\nkind = 'host'", r"write \[\[tiers\]\]"),
        ("[[tiers]]\ncapacity = '1GB'", "kind=None"),
        ("tiers = [3]", "kind=None"),
        ("tiers = ['host']", "host"),
        ("[engine", "is no TOML"),
    ],
)
def test_a_file_that_cannot_be_is_named(text: str, message: str, tmp_path: Path) -> None:
    """Field, value, remedy, and the place in the file."""
    with pytest.raises(ConfigError, match=message):
        load(text, folder=tmp_path)


def test_a_file_that_is_no_text_is_an_error(tmp_path: Path) -> None:
    """Not a UnicodeDecodeError from somewhere."""
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xff\xfe")

    with pytest.raises(ConfigError, match="is no TOML"):
        load_settings(file=path, environment={})


def test_an_unknown_flag_is_an_error() -> None:
    """With the nearest there is."""
    with pytest.raises(ConfigError, match=r"capacty among the flags .*did you mean capacity"):
        load(capacty="1GB")


def test_variables_that_others_read_are_left_alone() -> None:
    """The kernels' and the build's own are no settings of an engine, and no mistakes."""
    environment = {"KVKEEP_ISA": "avx2", "KVKEEP_NATIVE_LIBRARY": "/x.so", "KVKEEP_TORCH_SPEC": "y"}

    assert load(environment=environment).engine == EngineSettings()


def test_the_environment_may_name_the_file(tmp_path: Path) -> None:
    """A file that is named otherwise comes first."""
    (tmp_path / "a.toml").write_text("[engine]\nblock_size = 8\n")
    (tmp_path / "b.toml").write_text("[engine]\nblock_size = 64\n")
    environment = {"KVKEEP_CONFIG": str(tmp_path / "a.toml")}

    assert load_settings(environment=environment).engine.block_size == 8
    both = load_settings(file=tmp_path / "b.toml", environment=environment)
    assert both.engine.block_size == 64


def test_the_process_has_an_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read where none is given."""
    monkeypatch.setenv("KVKEEP_BLOCK_SIZE", "24")

    assert load_settings().engine.block_size == 24


# --------------------------------------------------------------------------------- command line


def run(*arguments: str) -> LoadedSettings:
    """Settings as a command with our options gets them."""
    seen: list[LoadedSettings] = []

    @click.command()
    @tier_options
    @click.option("--capacity", default="2GB")
    @click.option("--block-size", type=int, default=32)
    @click.pass_context
    def command(context: click.Context, /, **_: Any) -> None:
        seen.append(load_given(context))

    result = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def test_an_options_default_does_not_overrule_a_file(tmp_path: Path) -> None:
    """Only what was typed is a flag."""
    path = tmp_path / "kvkeep.toml"
    path.write_text(DOCUMENT)

    loaded = run("--config", str(path), "--capacity", "9GB")

    assert (loaded.engine.capacity, loaded.engine.block_size) == ("9GB", 16)
    assert tiers_of(loaded) == (Disk("/x", "50GB", write_on=("idle",)),)
    assert loaded.name_to_origin["tiers"].source is Source.FILE


def test_every_tier_of_the_command_line_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, over those of the environment."""
    monkeypatch.setenv("KVKEEP_TIERS", "disk:/y:1GB")

    loaded = run("--tier", "host:4GB", "--tier", "redis://h?ttl_s=60")

    assert tiers_of(loaded) == (Host("4GB"), Remote("redis://h", ttl_s=60.0))
    assert str(loaded.name_to_origin["tiers"]) == "--tier"
    assert tiers_of(run()) == (Disk("/y", "1GB"),)
