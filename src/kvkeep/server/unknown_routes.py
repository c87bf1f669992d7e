"""What to say of a path or a method that is not served: the nearest one that is."""

import re

from fastapi import Request

from kvkeep.config.nearest import nearest_hint

__all__ = ["allowed_methods", "no_route", "served_paths", "wrong_method"]

_PREFIX = "/v1"
_PARTS = re.compile(r"(\{[^}]*\})")
_MAX_CHARACTERS = 200


def served_paths(request: Request) -> list[str]:
    """All paths of the server, with the names of what varies in braces."""
    return sorted(request.app.openapi()["paths"])


def wrong_method(request: Request, allow: str) -> str:
    """The message for a path that is there, but for the methods `allow` alone."""
    return f"{_shown(request.url.path)} does not take {request.method}; send {allow}"


def allowed_methods(request: Request) -> list[str]:
    """What the path of a request takes."""
    return sorted(_methods(request, request.url.path))


def no_route(request: Request) -> str:
    """The message for a path that is not there, with what was probably meant."""
    path = request.url.path
    return (
        f"there is no {request.method} {_shown(path)}; {_remedy(request, path.rstrip('/') or '/')}"
    )


def _remedy(request: Request, path: str) -> str:
    if path == _PREFIX or path == _PREFIX * 2:
        return "it is the beginning of other paths; GET / says what there is"
    if path.startswith(f"{_PREFIX}{_PREFIX}/"):
        short = path.removeprefix(_PREFIX)
        if _methods(request, short):
            return f"it is {short}: leave {_PREFIX} out of the client's base URL"
    if _methods(request, _PREFIX + path):
        return f"it is {_PREFIX}{path}: end the client's base URL with {_PREFIX}"
    hint = nearest_hint(path, served_paths(request))
    return hint if hint.startswith("did you mean") else "GET / says what there is"


def _methods(request: Request, path: str) -> set[str]:
    found: set[str] = set()
    for template, methods in request.app.openapi()["paths"].items():
        pattern = "".join(
            ".+" if part.startswith("{") else re.escape(part) for part in _PARTS.split(template)
        )
        if re.fullmatch(pattern, path):
            found |= {method.upper() for method in methods}
    return found


def _shown(path: str) -> str:
    return path[:_MAX_CHARACTERS].encode("utf-8", "backslashreplace").decode()
