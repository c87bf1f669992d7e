"""Commands that ask a running server: where it is, what it answers, and how they end when it does not."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

import click

from kvkeep.cli.console import EXIT_CHECK_FAILED, EXIT_USAGE, Command, show_error

if TYPE_CHECKING:
    import httpx

__all__ = [
    "DEFAULT_URL",
    "EXIT_UNREACHABLE",
    "RefusedError",
    "Rows",
    "ServerClient",
    "ServerCommand",
    "UnreachableError",
    "client_of",
    "path_of",
    "read_json_file",
    "server_options",
]

EXIT_UNREACHABLE = 3
DEFAULT_URL = "http://127.0.0.1:8010"
# Long prompts are computed before the answer to a warm start comes.
_READ_TIMEOUT_S = 600.0
_CONNECT_TIMEOUT_S = 5.0
_CHUNK_BYTES = 2**20

_Function = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a list; `num_all` is how many there are, where that is known."""

    data: Sequence[dict[str, Any]]
    has_more: bool
    num_all: int | None = None

    @classmethod
    def first(cls, data: Sequence[dict[str, Any]], limit: int) -> "Rows":
        """The first of all rows."""
        return cls(data[:limit], has_more=len(data) > limit, num_all=len(data))


class UnreachableError(Exception):
    """There is no server, or it does not serve now."""


class RefusedError(Exception):
    """The server has refused; the message is its own."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class ServerCommand(Command):
    """A command of which a server may know more: its refusal is one line, its absence exit code 3."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except UnreachableError as error:
            show_error(str(error))
            ctx.exit(EXIT_UNREACHABLE)
        except RefusedError as error:
            show_error(str(error))
            ctx.exit(EXIT_USAGE if error.status == 400 else EXIT_CHECK_FAILED)


def server_options(function: _Function) -> _Function:
    """--url, --api-key and --tenant."""
    add_url = click.option(
        "--url",
        envvar="KVKEEP_URL",
        show_envvar=True,
        default=DEFAULT_URL,
        show_default=True,
        help="The server.",
    )
    add_key = click.option(
        "--api-key",
        metavar="KEY",
        help="An API key of the server, or its admin key.  [default: KVKEEP_ADMIN_KEY, or the first of "
        "KVKEEP_API_KEYS]",
    )
    add_tenant = click.option(
        "--tenant", metavar="ID", help="With the admin key: what this tenant has, by its id."
    )
    return add_url(add_key(add_tenant(function)))


def client_of(options: Mapping[str, Any]) -> "ServerClient":
    """A client for what `server_options` say, closed at the end of the command that runs."""
    key = options["api_key"] or _key_in_environment()
    client = ServerClient(options["url"], key, tenant=options["tenant"])
    click.get_current_context().call_on_close(client.close)
    return client


def _key_in_environment() -> str | None:
    """What a server that was started with this environment would take."""
    keys = os.environ.get("KVKEEP_API_KEYS", "").split()
    return os.environ.get("KVKEEP_ADMIN_KEY") or (keys[0] if keys else None)


def path_of(*parts: str) -> str:
    """A path of the server; parts may hold any character.

    >>> path_of("v1", "cache", "sessions", "a/b c")
    '/v1/cache/sessions/a%2Fb%20c'
    """
    return "/" + "/".join(quote(part, safe="") for part in parts)


def read_json_file(path: str) -> object:
    """The JSON of a file, "-" for stdin. Raises UsageError for what is no JSON."""
    try:
        text = sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")
        return json.loads(text)
    except OSError as error:
        raise click.UsageError(f"{path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is no JSON: {error}") from error


class ServerClient:
    """Asks a server. Raises UnreachableError and RefusedError."""

    def __init__(self, url: str, api_key: str | None, *, tenant: str | None = None) -> None:
        # Slow to load, and not needed for --help.
        import httpx

        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise click.UsageError(f"--url={url!r} is no URL; give http://HOST:PORT")
        headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
        self.url = url.rstrip("/").removesuffix("/v1")
        self._httpx = httpx
        self._client = httpx.Client(
            base_url=self.url,
            headers=headers,
            params=_given({"tenant": tenant}),
            timeout=httpx.Timeout(_READ_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            # A proxy for the world outside does not know this machine.
            trust_env=not _is_loopback(parts.hostname),
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def get(self, path: str, **query: object) -> dict[str, Any]:
        """The JSON of a GET; parameters that are None are left out."""
        return self._ask("GET", path, query=query)

    def post(self, path: str, body: object = None, **query: object) -> dict[str, Any]:
        """The JSON of a POST."""
        return self._ask("POST", path, body=body, query=query)

    def delete(self, path: str, **query: object) -> dict[str, Any]:
        """The JSON of a DELETE."""
        return self._ask("DELETE", path, query=query)

    def pages(self, path: str, limit: int, **query: object) -> Rows:
        """Rows of a list, as many as `limit`, over as many pages as that takes."""
        rows: list[dict[str, Any]] = []
        after, has_more = None, True
        while has_more and len(rows) < limit:
            size = min(limit - len(rows), 1000)
            page = self.get(path, limit=size, after=after, **query)
            rows += page["data"]
            after, has_more = page["last_id"], page["has_more"]
        return Rows(rows, has_more=has_more)

    def rows(self, path: str, limit: int, **query: object) -> Rows:
        """Rows of a list that comes whole, as many as `limit`."""
        return Rows.first(self.get(path, **query)["data"], limit)

    def download(self, path: str, target: Path, **query: object) -> int:
        """Write the answer of a POST to a file, which appears when it is whole; its bytes."""
        partial = target.with_name(target.name + ".partial")
        try:
            # The file first: an order that cannot be kept is not given.
            with partial.open("wb") as file:
                try:
                    num_bytes = self._download(path, file, query)
                    partial.replace(target)
                finally:
                    partial.unlink(missing_ok=True)
        except OSError as error:
            raise click.UsageError(
                f"FILE={str(target)!r} cannot be written ({error.strerror}); give another place"
            ) from error
        return num_bytes

    def _download(self, path: str, file: IO[bytes], query: Mapping[str, object]) -> int:
        with self._stream("POST", path, query=query) as response:
            num_bytes = sum(file.write(part) for part in response.iter_bytes(_CHUNK_BYTES))
        file.flush()
        return num_bytes

    def upload(self, path: str, source: Path, **query: object) -> dict[str, Any]:
        """The JSON of a POST whose body is a file."""
        with source.open("rb") as file:
            return self._ask("POST", path, content=file, query=query)

    def events(self, path: str) -> Iterator[dict[str, Any]]:
        """Server-sent events as they come, until the server ends."""
        with self._stream("GET", path, query={}) as response:
            for line in response.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line.removeprefix("data: "))

    def _ask(
        self, method: str, path: str, *, query: Mapping[str, object], **content: Any
    ) -> dict[str, Any]:
        if "body" in content:
            content["json"] = content.pop("body")
        with self._reaching():
            response = self._client.request(method, path, params=_given(query), **content)
        _check(response)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise RefusedError(
                response.status_code, f"{self.url} is no kvkeep server: no JSON came"
            )
        return answer

    @contextmanager
    def _stream(
        self, method: str, path: str, *, query: Mapping[str, object]
    ) -> Iterator["httpx.Response"]:
        with (
            self._reaching(),
            self._client.stream(method, path, params=_given(query)) as response,
        ):
            if response.is_error:
                response.read()
                _check(response)
            yield response

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except self._httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise UnreachableError(
                f"{self.url} cannot be reached ({reason}); start a server with kvkeep serve, or give --url"
            ) from error


def _check(response: "httpx.Response") -> None:
    if response.status_code == 503:
        raise UnreachableError(f"the server does not serve now: {_message(response)}")
    if response.is_error:
        raise RefusedError(response.status_code, _message(response))


def _message(response: "httpx.Response") -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {response.status_code}"


def _given(query: Mapping[str, object]) -> dict[str, str]:
    return {
        name: str(value).lower() if isinstance(value, bool) else str(value)
        for name, value in query.items()
        if value is not None
    }


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
