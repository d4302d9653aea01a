"""JSON in and out of the embedded server: SGLang's error bodies, and who may call what."""

from __future__ import annotations

import json
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from aiohttp import web

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

NEEDS_NO_KEY = ("/health", "/ready", "/metrics")
"""Beginnings of the paths that probes may read without a key."""
USER_PATHS = frozenset(
    (
        "/generate",
        "/model_info",
        "/get_model_info",
        "/server_info",
        "/get_server_info",
        "/v1/models",
        "/v1/loads",
        "/load_lora_adapter_from_tensors",
    )
)
"""What `--api-key` protects even where there is an `--admin-api-key`; all else is the admin's. SGLang's division."""

_REQUIRED: Any = object()


class BodyError(ValueError):
    """A body that is not JSON, not an object, or lacks a field: refused before anybody looked at its meaning."""


class NotServingError(RuntimeError):
    """The server lives but cannot generate now; another one may."""


async def read_json(request: web.Request) -> Mapping[str, Any]:
    """Return the body.

    Raises:
        BodyError: it is not a JSON object.
    """
    try:
        body = json.loads(await request.text())
    except ValueError as error:
        raise BodyError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise BodyError("the body must be a JSON object")
    return body


def field(body: Mapping[str, Any], name: str, kind: type[T], default: T | None = _REQUIRED) -> T:
    """Return one field of a body; null is as good as absent.

    Raises:
        BodyError: it is required and absent, or of another type.
    """
    value = body.get(name)
    if value is None and default is not _REQUIRED:
        return default  # type: ignore[return-value]
    if type(value) is not kind:
        raise BodyError(f"{name} must be given as {kind.__name__}, not {value!r:.100}")
    return value


def error(message: str, status: int) -> web.Response:
    """Return the body of a failed request."""
    return web.json_response({"error": {"message": message}}, status=status)


def outcome(success: bool, message: str, **more: Any) -> web.Response:
    """Return the body of a control call."""
    return web.json_response({"success": success, "message": message, **more}, status=200 if success else 400)


@web.middleware
async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer a request that raised."""
    try:
        return await handler(request)
    except BodyError as problem:
        body = {"object": "error", "message": str(problem), "type": "Bad Request", "param": None, "code": 400}
        return web.json_response(body, status=400)
    except ValueError as problem:
        return error(str(problem), 400)
    except NotServingError as problem:
        return error(str(problem), 503)


def key_check(api_key: str | None, admin_api_key: str | None) -> Callable[..., Awaitable[web.StreamResponse]]:
    """Return a middleware that answers 401 to requests without the key that their path needs."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        key = api_key if request.path in USER_PATHS else admin_api_key or api_key
        if key and not request.path.startswith(NEEDS_NO_KEY) and not _bears(request, key):
            return web.json_response({"error": "Unauthorized"}, status=401)
        return await handler(request)

    return check


def _bears(request: web.Request, key: str) -> bool:
    scheme, _, token = request.headers.get("Authorization", "").partition(" ")
    return scheme.lower() == "bearer" and secrets.compare_digest(token.encode(), key.encode())
