"""Prompts to compute ahead, as settings and files of prompts name them.

[[warm]]                 a file is text, or a request in JSON, or a catalogue: JSON lines with a name each,
name = "law"             messages, prompt or token_ids, and their own ttl, tags, pin and salt if need be
file = "law.txt"
ttl = "7d"
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from kvkeep.config.cache_options import check_name
from kvkeep.config.durations import parse_duration
from kvkeep.config.nearest import nearest_hint
from kvkeep.errors import ConfigError

__all__ = ["WarmPrompt", "WarmTable", "check_kept", "parse_warm", "prompt_fields", "read_prompts"]

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
        kept = {name: table[name] for name in _KEPT_BY if name in table}
        try:
            check_kept(kept)
        except ConfigError as error:
            raise ConfigError(f"{error} (in {place})") from error
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
    check_kept(kept)
    if not text.strip():
        raise ConfigError(f"file={str(path)!r} is empty; write a prompt into it")
    if path.suffix == _CATALOGUE:
        if name is not None:
            raise ConfigError(f"name={name!r} is one for many; prompts of {path} have their own")
        yield from _catalogue(text, path, kept)
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
        given = [name for name in _FORMS if name in fields]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} are given; give one of them")
        if isinstance(fields.get("prompt"), list):
            fields["token_ids"] = fields.pop("prompt")
        if given:
            _check_prompt(fields)
            return fields
    raise ConfigError("the request has no prompt; it needs messages, prompt or token_ids")


def _check_prompt(fields: Mapping[str, object]) -> None:
    prompt, messages, ids = (fields.get(name) for name in ("prompt", "messages", "token_ids"))
    if prompt is not None and not isinstance(prompt, str):
        raise ConfigError(f"prompt={prompt!r:.80} is no text; write it in quotes")
    if messages is not None and not _is_list(messages, dict):
        raise ConfigError(f"messages={messages!r:.80} is no list of messages; write one as in chat")
    if ids is not None and not _is_list(ids, int):
        raise ConfigError(f"token_ids={ids!r:.80} is no list of whole numbers; give a prompt's")


def _is_list(value: object, kind: type) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, kind) and not isinstance(one, bool) for one in value
    )


def check_kept(kept: Mapping[str, object]) -> None:
    """Raise ConfigError for what a server would refuse, and for a time that keeps nothing."""
    ttl, tags, pin, salt = (kept.get(name) for name in _KEPT_BY)
    if ttl is not None and parse_duration("ttl", ttl) == 0:
        raise ConfigError(f'ttl={ttl!r} keeps nothing; give a time, such as "7d", or leave it out')
    if tags is not None and not isinstance(tags, list | tuple):
        raise ConfigError(f'tags={tags!r:.80} is no list; write ["{tags}"]')
    for tag in cast(Sequence[object], tags or ()):
        check_name("tags", tag)
    if pin is not None and not isinstance(pin, bool):
        raise ConfigError(f"pin={pin!r:.80} is neither true nor false; give one of them")
    if salt is not None and not isinstance(salt, str):
        raise ConfigError(f"salt={salt!r:.80} is no text; write it in quotes")


def _catalogue(text: str, path: Path, kept: Mapping[str, object]) -> Iterator[WarmPrompt]:
    taken: dict[tuple[str, object], int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        one = _catalogued(line, place, kept)
        first = taken.setdefault((one.name, one.fields.get("salt")), number)
        if first != number:
            raise ConfigError(f"{place}: {one.name} is the name of line {first} too; give another")
        yield one


def _catalogued(line: str, place: str, kept: Mapping[str, object]) -> WarmPrompt:
    entry = _json(line, place)
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise ConfigError(f"{place} has no name; every prompt needs one")
    own = {name: entry[name] for name in _KEPT_BY if entry.get(name) is not None}
    try:
        check_kept(own)
        fields = prompt_fields(entry)
    except ConfigError as error:
        raise ConfigError(f"{place}: {entry['name']}: {error}") from error
    return WarmPrompt(name=entry["name"], fields={**fields, **kept, **own}, place=place)


def _json(text: str, place: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{place} is no JSON: {error}") from error
