"""From a plain completion request to all that its generation needs: everything but the generation."""

from __future__ import annotations

from dataclasses import dataclass

from quart import Request

from jaxserve.inputs import TokenizedPrompt
from jaxserve.sampling_params import SamplingParams
from jaxserve.server.intake import Intake, take
from jaxserve.server.prompts import completion_prompts
from jaxserve.server.protocol import CompletionRequest
from jaxserve.server.response_format import asked_constraint, constrained
from jaxserve.server.sampling import check_stream_options, completion_sampling
from jaxserve.server.state import ServerState
from jaxserve.server.unsupported import COMPLETION_FIELDS


@dataclass(frozen=True, slots=True)
class PreparedCompletion:
    """A request that has passed every check that is possible before its first token."""

    taken: Intake[CompletionRequest]
    prompts: list[TokenizedPrompt]
    params: SamplingParams


async def prepare_completion(state: ServerState, request: Request) -> PreparedCompletion:
    """Read a request.  Raises ApiError or JaxserveError for what cannot be answered."""
    taken = await take(state, request, CompletionRequest, COMPLETION_FIELDS)
    fields = taken.fields
    check_stream_options(fields)
    constraint = asked_constraint(fields)
    params = completion_sampling(state.llm, fields)
    prompts = await completion_prompts(state.llm, fields, params)
    if constraint is not None:
        params = await constrained(params, constraint, state.llm)
    return PreparedCompletion(taken, prompts, params)
