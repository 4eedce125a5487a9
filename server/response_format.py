"""From response_format and structured_outputs to the one constraint of an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from jaxserve.async_llm import AsyncLLM
from jaxserve.errors import RequestError
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.format_fields import ResponseFormat, StructuredOutputs
from jaxserve.server.protocol import GenerationRequest
from jaxserve.structured_outputs import StructuredOutputsParams


async def constrained(
    params: SamplingParams, constraint: StructuredOutputsParams, llm: AsyncLLM
) -> SamplingParams:
    """`params` with a constraint, compiled.  Raises RequestError for one that cannot be."""
    await llm.check_structured(constraint)
    return replace(params, structured_outputs=constraint)


def asked_constraint(request: GenerationRequest) -> StructuredOutputsParams | None:
    """What the request says of the answer, or None for free text.

    Raises RequestError naming the field that is wrong, or one of the two when both constrain the answer.
    """
    response_format, structured_outputs = request.response_format, request.structured_outputs
    of_format = None if response_format is None else _of_response_format(response_format)
    if structured_outputs is None:
        return of_format
    if of_format is not None:
        raise RequestError(
            "response_format and structured_outputs cannot both constrain the answer: send one of them.",
            param="structured_outputs",
        )
    return _of_structured_outputs(structured_outputs)


def _of_response_format(given: ResponseFormat) -> StructuredOutputsParams | None:
    if given.type == "json_object":
        return StructuredOutputsParams(json_object=True, param="response_format")
    if given.type == "json_schema":
        if given.json_schema is None:
            raise _incomplete("json_schema", "with a name and a schema")
        if given.json_schema.schema_ is None:
            raise _incomplete("json_schema.schema", "(a JSON schema)")
        return StructuredOutputsParams(json=given.json_schema.schema_, param="response_format")
    if given.type == "structural_tag":
        return StructuredOutputsParams(structural_tag=_structural_tag(given), param="response_format")
    return None


def _structural_tag(given: ResponseFormat) -> dict[str, Any]:
    """In the form in which it came: with `format`, or the older one with `structures` and `triggers`."""
    if given.format is not None:
        return {"type": given.type, "format": given.format}
    if given.structures is None:
        raise _incomplete("format", "(or structures and triggers)")
    if given.triggers is None:
        raise _incomplete("triggers", "beside structures")
    return {"type": given.type, "structures": given.structures, "triggers": given.triggers}


def _of_structured_outputs(given: StructuredOutputs) -> StructuredOutputsParams:
    schema, tag = given.json_, given.structural_tag
    if not isinstance(schema, dict | str | bool | None):
        raise _wrong("json", "a JSON schema, as an object or as text", schema)
    if not isinstance(tag, dict | str | None):
        raise _wrong("structural_tag", "an object, or its text", tag)
    if given.choice is not None and not given.choice:
        raise _wrong("choice", "a list of at least one string", given.choice)
    return StructuredOutputsParams(
        json=schema,
        regex=given.regex,
        choice=given.choice,
        grammar=given.grammar,
        json_object=given.json_object,
        structural_tag=tag,
        whitespace_pattern=given.whitespace_pattern,
        disable_any_whitespace=bool(given.disable_any_whitespace),
        disable_additional_properties=bool(given.disable_additional_properties),
    )


def _incomplete(missing: str, wants: str) -> RequestError:
    return RequestError(
        f"response_format of this type needs response_format.{missing} {wants}.", param="response_format"
    )


def _wrong(name: str, wants: str, value: Any) -> RequestError:
    return RequestError(
        f"structured_outputs.{name} must be {wants}, got {value!r:.60}.", param="structured_outputs"
    )
