"""The OpenAPI description at ``/openapi.json``, from the classes that bodies are checked with."""

from typing import Any

import msgspec
from fastapi import FastAPI

from clo.runtime.http import answers, requests
from clo.runtime.wire.messages import SamplingParams

_ANSWERS = (
    answers.ChatCompletion,
    answers.Completion,
    answers.Detokenized,
    answers.ErrorBody,
    answers.Health,
    answers.Load,
    answers.Model,
    answers.Models,
    answers.Stats,
    answers.Tokenized,
    answers.Version,
)
_PLACE = "#/components/schemas/{name}"


def _json(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"content": {"application/json": {"schema": {"$ref": _PLACE.format(name=kind.__name__)}}}}


def body(kind: type[msgspec.Struct]) -> dict[str, Any]:
    """What an endpoint says of the body that it takes."""
    return {"requestBody": {"required": True, **_json(kind)}}


def answers_with(kind: type[msgspec.Struct]) -> dict[int | str, dict[str, Any]]:
    """What an endpoint says of its answers."""
    error = {"description": "What is wrong, in OpenAI's form", **_json(answers.ErrorBody)}
    return {200: {"description": "The answer", **_json(kind)}, "4XX": error, "5XX": error}


def complete(app: FastAPI) -> None:
    """Add the classes to what FastAPI writes."""
    written = app.openapi()
    _, components = msgspec.json.schema_components(
        [*requests.BODIES, *_ANSWERS, SamplingParams], ref_template=_PLACE
    )
    sampling = components.pop(SamplingParams.__name__)["properties"]
    for kind in (requests.CompletionRequest, requests.ChatCompletionRequest):
        components[kind.__name__]["properties"] = sampling | components[kind.__name__]["properties"]
    written.setdefault("components", {}).setdefault("schemas", {}).update(components)
