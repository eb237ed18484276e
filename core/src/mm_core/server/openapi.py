"""/openapi.json: the document of all routes, made of their models."""

from __future__ import annotations

import asyncio
import inspect
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

from pydantic import BaseModel, Field
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import Response

from mm_core import __version__
from mm_core.server.context import context_of
from mm_core.server.failures import json_reply
from mm_core.server.routing import Reply, Route, RouteTable

_REF = "#/components/schemas/{model}"
_PLACE = re.compile(r"\{(\w+)(?::\w+)?\}")


class ErrorDetail(BaseModel):
    """What went wrong. code: for programs, stable; param: the field at fault; request_id: as in the server's log."""

    message: str
    type: str
    param: str | None
    code: str
    request_id: str | None = Field(default=None)


class Error(BaseModel):
    """The body of every reply that is no success."""

    error: ErrorDetail


_ALWAYS = {
    400: "The call is not valid.",
    431: "The headers are more, or larger, than the server takes.",
    500: "The server failed.",
    503: "The server starts, drains, or its engine is being started again: Retry-After says when to come back.",
}
_OF_KEYS = {401: "No valid API key."}
_OF_PAGES = {403: "A web page of an origin that was not allowed."}
_OF_ADMIN = {403: "A key that is not the admin key.", 404: "The admin routes are off."}
_OF_BODIES = {
    404: "There is no such model.",
    408: "The call did not arrive in time.",
    413: "The body, or an item in it, is too large.",
    429: "Too many calls wait: Retry-After says when to come back.",
    504: "The answer took too long.",
}


def document(table: RouteTable, *, keys: bool, model: str) -> dict[str, Any]:
    """The document. keys: whether the routes need one. model: the only name that bodies may give."""
    names, schemas = _schemas(table)
    for route in table.routes:
        if route.request_model is not None:
            _name_model(schemas[names[(route.request_model, "validation")]["$ref"].rpartition("/")[2]], model)
    paths: dict[str, dict[str, Any]] = {}
    for route in table.routes:
        paths.setdefault(_PLACE.sub(r"{\1}", route.path), {})[route.method.lower()] = _operation(route, names, keys)
    components: dict[str, Any] = {"schemas": schemas}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    info = {"title": "mm-core", "version": __version__, "description": "An OpenAI-compatible server."}
    return {"openapi": "3.1.0", "info": info, "paths": paths, "components": components}


async def show(request: Request) -> Response:
    """This document."""
    state = request.app.state
    if not hasattr(state, "document"):
        context = context_of(request)
        keys = bool(context.config.api_keys)
        state.document = await asyncio.to_thread(partial(document, state.table, keys=keys, model=context.model_name))
    return json_reply(state.document)


_Names = Mapping[Any, Any]  # of models with their mode: references to their schemas


def _schemas(table: RouteTable) -> tuple[_Names, dict[str, Any]]:
    """References by model and mode, and the schemas that they lead to."""
    wanted: dict[tuple[type[BaseModel], JsonSchemaMode], None] = {(Error, "serialization"): None}
    for route in table.routes:
        if route.request_model is not None:
            wanted[(route.request_model, "validation")] = None
        for reply in route.replies.values():
            wanted |= {(each, "serialization"): None for each in _all(reply) if not isinstance(each, str)}
    names, definitions = models_json_schema(list(wanted), ref_template=_REF)
    return names, definitions.get("$defs", {})


def _name_model(schema: dict[str, Any], model: str) -> None:
    """Say which model a body may name, where it has the field."""
    field = schema.get("properties", {}).get("model")
    if field is not None:
        for option in field.get("anyOf", [field]):
            if option.get("type") == "string":
                option["enum"] = [model]


def _operation(route: Route, names: _Names, keys: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": route.handler.__name__,
        "summary": route.summary,
        "description": inspect.getdoc(route.handler) or "",
        "responses": _responses(route, names, keys),
    }
    if places := _PLACE.findall(route.path):
        found["parameters"] = [
            {"name": each, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for each in places
        ]
    if route.request_model is not None:
        schema = names[(route.request_model, "validation")]
        found["requestBody"] = {"required": True, "content": {route.request_mime: {"schema": schema}}}
    if keys and route.access != "open":
        found["security"] = [{"key": []}]
    return found


def _responses(route: Route, names: _Names, keys: bool) -> dict[str, Any]:
    errors = dict(_ALWAYS)
    if route.request_model is not None:
        errors |= _OF_BODIES
    if "{" in route.path:
        errors[404] = "There is no such thing."
    if route.access == "admin":
        errors |= {**_OF_ADMIN, **_OF_KEYS}
    if route.access != "open":
        errors = {**(_OF_KEYS if keys else _OF_PAGES), **errors}
    wrong = {"application/json": {"schema": names[(Error, "serialization")]}}
    found: dict[str, Any] = {str(n): {"description": text, "content": wrong} for n, text in errors.items()}
    for status, reply in route.replies.items():
        content = dict(_content(each, names) for each in _all(reply))
        other = found.get(str(status))
        if other is not None:  # a status that both a reply of the route's own and an error may have
            content = _either(content, other["content"])
        found[str(status)] = {"description": route.summary or "Done.", "content": content}
    return dict(sorted(found.items()))


def _either(own: dict[str, Any], wrong: dict[str, Any]) -> dict[str, Any]:
    kind = "application/json"
    if kind not in own:
        return {**own, **wrong}
    return {**own, kind: {"schema": {"anyOf": [own[kind]["schema"], wrong[kind]["schema"]]}}}


def _content(reply: Reply, names: _Names) -> tuple[str, dict[str, Any]]:
    if isinstance(reply, str):
        anything = reply in ("application/json", "text/event-stream")  # of a stream, the schema is that of an event
        return reply, {"schema": {} if anything else {"type": "string"}}
    return "application/json", {"schema": names[(reply, "serialization")]}


def _all(reply: Reply | tuple[Reply, ...]) -> tuple[Reply, ...]:
    return reply if isinstance(reply, tuple) else (reply,)


ROUTES = (Route("/openapi.json", "GET", show, summary="This document"),)
