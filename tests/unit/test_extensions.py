"""What installed packages add is found by name and loaded on demand, and their faults are named."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvkeep.config.extensions import ExtensionGroup, extension_names, find_extension
from kvkeep.config.tier_tables import parse_tier
from kvkeep.errors import ConfigError
from kvkeep.policies import LRU, make_policy
from kvkeep.tiers.floors import open_floors, tier_settings
from kvkeep.tiers.host import HostTier

SOURCE = '''
"""A package of somebody else."""
from dataclasses import dataclass
from kvkeep.policies import LRU
from kvkeep.tiers.host import HostTier

@dataclass(frozen=True)
class Tape:
    drive: str
    pages: int = 4
    write_on: tuple[str, ...] = ("closing",)
    name: str | None = None
    kind = "tape"

    def open(self, name):
        return HostTier(4096 * self.pages, name=name)

class Fifo(LRU):
    pass

def plain(**options):
    return Tape(**options)

number = 7
'''


def install(folder: Path, package: str, module: str, source: str, points: dict[str, str]) -> None:
    """Lay down a distribution as pip does: a module, its metadata and its entry points."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{module}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.2\n")
    lines = [f"[{group}]\n{names}\n" for group, names in points.items()]
    (info / "entry_points.txt").write_text("\n".join(lines))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that Python finds, and forgets afterwards."""
    monkeypatch.syspath_prepend(str(tmp_path))
    loaded = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if name.startswith("kvkeep_"):
            del sys.modules[name]


@pytest.fixture
def tape(site: Path) -> Path:
    """A package that adds tiers and a policy."""
    install(
        site,
        "kvkeep-tape",
        "kvkeep_tape",
        SOURCE,
        {
            "kvkeep.tiers": "tape = kvkeep_tape:Tape\nplain = kvkeep_tape:plain\n"
            "number = kvkeep_tape:number\ngone = kvkeep_tape:Gone",
            "kvkeep.policies": "fifo = kvkeep_tape:Fifo",
        },
    )
    return site


@pytest.mark.usefixtures("tape")
def test_names_are_found_without_loading_anything() -> None:
    """Listing costs no import of somebody else's code."""
    assert {"tape", "plain"} <= set(extension_names(ExtensionGroup.TIERS))
    assert "fifo" in extension_names(ExtensionGroup.POLICIES)
    assert "kvkeep_tape" not in sys.modules

    find_extension(ExtensionGroup.TIERS, "tape")

    assert "kvkeep_tape" in sys.modules


@pytest.mark.usefixtures("tape")
def test_an_installed_tier_opens_from_its_text() -> None:
    """Text becomes what the fields of its settings are; its floor is one like ours."""
    settings = tier_settings(parse_tier("tape?drive=/dev/st0&pages=2"))

    (floor,) = open_floors([settings])

    with floor.tier as tier:
        assert isinstance(tier, HostTier)
        assert (tier.name, tier.capacity_bytes) == ("tape", 8192)
    assert {str(occasion) for occasion in floor.write_on} == {"closing"}


@pytest.mark.usefixtures("tape")
def test_an_installed_tier_may_be_a_function() -> None:
    """Then it gets the options as they are written."""
    assert tier_settings(parse_tier("plain?drive=x")).kind == "tape"


@pytest.mark.usefixtures("tape")
def test_an_installed_policy_is_made_by_name() -> None:
    """As ours are."""
    assert isinstance(make_policy("fifo"), LRU)


@pytest.mark.usefixtures("tape")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tapes?drive=x", "tier='tapes' is not known; did you mean tape"),
        ("zzz?drive=x", "choose from .*disk.*host.*tape"),
        ("tape?drvie=x", "drvie.*did you mean drive"),
        ("tape?pages=2", "drive is missing"),
        ("tape?drive=x&pages=two", "pages='two' is no whole number"),
        ("plain?drvie=x", "options do not fit.*drvie"),
        ("number", "tier=7 is no class of settings"),
        ("gone", r"tier='gone' of kvkeep-tape 1\.2 cannot be loaded from kvkeep_tape:Gone"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    """The name, the package and the remedy; and the tier in which it was written."""
    with pytest.raises(ConfigError, match=message) as caught:
        tier_settings(parse_tier(text))

    assert "(in tier " in str(caught.value)


def test_a_package_that_cannot_be_imported_is_named(site: Path) -> None:
    """Whatever it raises: it is not our fault, and the message says whose."""
    install(
        site,
        "kvkeep-broken",
        "kvkeep_broken",
        "1 / 0",
        {"kvkeep.codecs": "zip = kvkeep_broken:Zip"},
    )

    with pytest.raises(
        ConfigError, match=r"codec='zip' of kvkeep-broken 1\.2 .*ZeroDivisionError"
    ) as caught:
        find_extension(ExtensionGroup.CODECS, "zip")

    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_one_name_of_two_packages_is_an_error(site: Path) -> None:
    """Neither wins by the order of folders."""
    for letter in "ab":
        points = {"kvkeep.tiers": f"tape = kvkeep_{letter}:Tape"}
        install(site, f"kvkeep-{letter}", f"kvkeep_{letter}", SOURCE, points)

    with pytest.raises(ConfigError, match=r"offered by kvkeep-a 1\.2 and kvkeep-b 1\.2"):
        find_extension(ExtensionGroup.TIERS, "tape")


def test_an_unknown_name_lists_what_there_is() -> None:
    """Ours and installed ones, and how more are added."""
    with pytest.raises(ConfigError, match=r"policy='lfu'.*known: .*lru, slru.*kvkeep\.policies"):
        find_extension(ExtensionGroup.POLICIES, "lfu", built_in=["slru", "lru"])
