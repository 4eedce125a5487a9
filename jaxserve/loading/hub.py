"""Brings a model's files from the Hugging Face hub, or from its local cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import cast

from jaxserve.errors import CheckpointError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# What a checkpoint in Hugging Face layout consists of; never pickles, never code.
_CONFIG_FILES = ["*.json", "*.jinja", "tokenizer.model", "*.txt"]
_WEIGHT_FILES = ["*.safetensors"]
_UNWANTED_FILES = ["*/*", "consolidated*", "*.bin.index.json", "README*", "LICENSE*"]


def is_hub_name(model: str) -> bool:
    """Whether `model` reads as OWNER/NAME."""
    return _HUB_NAME.fullmatch(model) is not None


def download_from_hub(model: str, *, with_weights: bool, revision: str | None = None) -> Path:
    """The model's snapshot directory in the hub's cache; what is not there yet is downloaded (resumable).

    `revision` is a branch, a tag or a commit; None is the branch that the hub shows.

    HF_HUB_OFFLINE, HF_HOME, HF_TOKEN and HF_ENDPOINT mean what they mean to huggingface_hub.  Raises
    CheckpointError naming the model if it does not exist, needs a token, or is neither reachable nor cached.
    """
    # Imported late: an eighth of a second that a local model need not pay.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    patterns = _CONFIG_FILES + (_WEIGHT_FILES if with_weights else [])
    # HTTPError of whichever httpx this huggingface_hub uses: proxies and broken connections raise it plain.
    transport_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        return Path(
            snapshot_download(
                model, revision=revision, allow_patterns=patterns, ignore_patterns=_UNWANTED_FILES
            )
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"{model}: gated on the hub; accept its terms there and set HF_TOKEN (or run `hf auth login`)"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(f"{model}: has no revision {revision!r} on the hub") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{model}: neither a path here nor a model on the hub (a private one needs HF_TOKEN)"
        ) from error
    except HFValidationError as error:
        raise CheckpointError(f"{model}: neither a path here nor a valid hub name: {error}") from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{model}: no such path here, not in the hub's local cache, and the hub cannot be reached "
            "(no network, or HF_HUB_OFFLINE is set).  Connect, or give a directory or a .gguf file"
        ) from error
    except (OSError, transport_error) as error:
        raise CheckpointError(
            f"{model}: no such path here, and downloading it from the hub failed: {type(error).__name__}: "
            f"{error}.  What has arrived is kept; try again"
        ) from error
