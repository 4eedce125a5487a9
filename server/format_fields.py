"""The fields of a request that say what an answer must look like: names and types, nothing else."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class JsonSchemaFormat(BaseModel):
    """response_format.json_schema"""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    name: str
    description: str | None = None  # for the caller's own records: the model does not see it
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None  # answers always keep to the schema


class ResponseFormat(BaseModel):
    """response_format; which of the other fields counts depends on `type`."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    # Of structural tags, in the two forms that vLLM knows.
    format: dict[str, Any] | None = None
    structures: list[dict[str, Any]] | None = Field(default=None, fail_fast=True)
    triggers: list[str] | None = Field(default=None, fail_fast=True)


class StructuredOutputs(BaseModel):
    """vLLM's structured_outputs: one of the first six."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    json_: Any = Field(default=None, alias="json")  # a schema, or its text
    regex: str | None = None
    choice: list[str] | None = Field(default=None, fail_fast=True)
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None  # an object, or its text
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    disable_fallback: bool | None = None  # to another backend: there is but one
