"""The small endpoints: health, version, load, models, metrics."""

from __future__ import annotations

import uuid

from prometheus_client import CONTENT_TYPE_LATEST
from quart import Response

from jaxserve import __version__
from jaxserve.server.answers import ModelCard, ModelList, ModelPermission
from jaxserve.server.respond import json_response
from jaxserve.server.state import ServerState


def health(state: ServerState) -> Response:
    """200 while requests are answered, 503 once the engine is dead or the server is going down."""
    state.check_open()
    return Response("", 200)


def version() -> Response:
    """Which jaxserve this is."""
    return json_response({"version": __version__})


def load(state: ServerState) -> Response:
    """How busy the server is: requests in flight, and what the engine makes of them."""
    stats = state.llm.stats()
    return json_response(
        {
            "server_load": state.llm.num_in_flight,
            "num_requests_running": stats.num_running,
            "num_requests_waiting": stats.num_waiting,
        }
    )


def metrics(state: ServerState) -> Response:
    """For Prometheus."""
    return Response(state.metrics.exposition(), 200, content_type=CONTENT_TYPE_LATEST)


def models(state: ServerState) -> Response:
    """Every name that is served."""
    return json_response(ModelList("list", [_card(state, name) for name in state.model_names]))


def model(state: ServerState, name: str) -> Response:
    """One of the names.  Raises ApiError 404 for any other."""
    return json_response(_card(state, state.check_model(name)))


def _card(state: ServerState, name: str) -> ModelCard:
    return ModelCard(
        id=name,
        object="model",
        created=state.started_at,
        owned_by="jaxserve",
        root=state.llm.info.model,
        max_model_len=state.llm.info.max_model_len,
        permission=[ModelPermission(id=f"modelperm-{uuid.uuid4().hex}", created=state.started_at)],
    )
