"""Prompts to compute ahead, as settings and files of prompts name them.

[[warm]]                 a file is text, or a request in JSON, or a catalogue: JSON lines with a name each,
name = "law"             messages, prompt or token_ids, and their own ttl, tags, pin and salt if need be
file = "law.txt"
ttl = "7d"
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError

__all__ = ["WarmPrompt", "WarmTable", "parse_warm", "prompt_fields", "read_prompts"]

_FORMS = ("messages", "prompt", "token_ids")
_PROMPT_FIELDS = (*_FORMS, "tools", "chat_template_kwargs", "add_generation_prompt")
_KEPT_BY = ("ttl", "tags", "pin", "salt")
_CATALOGUE = ".jsonl"


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmPrompt:
    """A prompt that is computed ahead and kept as the context `name`.

    `fields` are the other fields of a request to POST /v1/cache/contexts, unchecked: what makes the prompt,
    and ttl, tags, pin and salt. `place` is where it was written, for messages about it.
    """

    name: str
    fields: Mapping[str, object]
    place: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class WarmTable:
    """One [[warm]] of a settings file; `folder` is where that lies, and what `file` is relative to."""

    options: Mapping[str, object]
    folder: Path
    place: str

    def prompts(self) -> list[WarmPrompt]:
        """What the table asks for, its file read. Raises ConfigError, naming the table."""
        try:
            return list(self._prompts())
        except ConfigError as error:
            raise ConfigError(f"{error} (from {self.place})") from error

    def _prompts(self) -> Iterator[WarmPrompt]:
        own = {name: one for name, one in self.options.items() if name not in ("name", "file")}
        name, file = self.options.get("name"), self.options.get("file")
        prompt = [one for one in _PROMPT_FIELDS if one in own]
        if name is not None and not isinstance(name, str):
            raise ConfigError(f"name={name!r} is no name; give text")
        if file is None:
            if name is None:
                raise ConfigError("name is missing; give it, or a file")
            kept = {one: own[one] for one in _KEPT_BY if one in own}
            yield WarmPrompt(name=name, fields={**prompt_fields(own), **kept}, place=self.place)
            return
        if prompt or not isinstance(file, str):
            wrong = f"file and {prompt[0]} are given" if prompt else f"file={file!r} is no path"
            raise ConfigError(f"{wrong}; give the path of a file, or a prompt")
        yield from read_prompts(self.folder / Path(file).expanduser(), name=name, kept=own)


def parse_warm(tables: object, path: Path) -> tuple[WarmTable, ...]:
    """The [[warm]] tables of a settings file at `path`; files that they name are not read."""
    if not isinstance(tables, list) or not all(isinstance(one, dict) for one in tables):
        raise ConfigError(f"warm in {path} is no list of tables; write [[warm]] above every prompt")
    found = []
    for number, table in enumerate(tables, 1):
        place = f"[[warm]] number {number} in {path}"
        known = ["name", "file", *_PROMPT_FIELDS, *_KEPT_BY]
        for name in table:
            if name not in known:
                raise ConfigError(f"{name} in {place} is no setting; {nearest_hint(name, known)}")
        found.append(WarmTable(table, path.absolute().parent, place))
    return tuple(found)


def read_prompts(
    path: Path, *, name: str | None = None, kept: Mapping[str, object] | None = None
) -> Iterator[WarmPrompt]:
    """The prompts of a file: text, a request (.json), or a catalogue (.jsonl), whose lines have names.

    `name` is by default that of the file; `kept` are ttl, tags, pin and salt where a line does not say them.
    Raises ConfigError for what cannot be read, naming the file and the line.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"file={str(path)!r} cannot be read as text ({error})") from error
    kept = kept or {}
    if path.suffix == _CATALOGUE:
        if name is not None:
            raise ConfigError(f"name={name!r} is one for many; prompts of {path} have their own")
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                yield _catalogued(line, f"{path}, line {number}", kept)
        return
    place = str(path)
    fields: dict[str, object] = {"prompt": text}
    if path.suffix == ".json":
        fields = prompt_fields(_json(text, place))
    yield WarmPrompt(name=name or path.stem, fields={**fields, **kept}, place=place)


def prompt_fields(request: object) -> dict[str, object]:
    """Of a request the fields that make its prompt. Raises ConfigError where there are none."""
    if isinstance(request, dict):
        fields = {name: request[name] for name in _PROMPT_FIELDS if request.get(name) is not None}
        if isinstance(fields.get("prompt"), list):
            fields["token_ids"] = fields.pop("prompt")
        if any(name in fields for name in _FORMS):
            return fields
    raise ConfigError("the request has no prompt; it needs messages, prompt or token_ids")


def _catalogued(line: str, place: str, kept: Mapping[str, object]) -> WarmPrompt:
    entry = _json(line, place)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"{place} has no name; every prompt needs one")
    own = {name: entry[name] for name in _KEPT_BY if entry.get(name) is not None}
    try:
        fields = prompt_fields(entry)
    except ConfigError as error:
        raise ConfigError(f"{place}: {error}") from error
    return WarmPrompt(name=entry["name"], fields={**fields, **kept, **own}, place=place)


def _json(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is no JSON: {error}") from error
