"""Settings from what a test gives, and from nothing else."""

from pathlib import Path

from kvkeep.config.sources import LoadedSettings, load_settings


def load(
    text: str | None = None,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
    **flags: object,
) -> LoadedSettings:
    """What a file in `folder` with this text, the environment and flags say."""
    file = None
    if text is not None:
        assert folder is not None
        file = folder / "kvkeep.toml"
        file.write_text(text, encoding="utf-8")
    return load_settings(file=file, environment=environment or {}, flags=flags)
