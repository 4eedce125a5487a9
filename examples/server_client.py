"""What the examples that ask a server share: a client, the model's name, and a sentence where something is wrong."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

try:
    from openai import APIConnectionError, APIStatusError, AuthenticationError, NotFoundError, OpenAI
except ImportError:
    sys.exit("This example needs the `openai` package: pip install openai (or run it with .venv/bin/python)")

DEFAULT_URL = os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1"


@contextmanager
def connected(base_url: str, *, start_it: str = "make serve") -> Iterator[tuple[OpenAI, str]]:
    """A client of the server at `base_url` and the name of its model; ends the process where that cannot be."""
    client = OpenAI(base_url=base_url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
    try:
        yield client, client.models.list().data[0].id
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the answer has read enough (`… | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor is there anything to say at exit
        sys.exit(1)
    except APIConnectionError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error.__cause__):
            sys.exit(f"The certificate of {base_url} is not trusted here: name it in SSL_CERT_FILE")
        sys.exit(f"Nobody answers at {base_url}: start the server first ({start_it})")
    except AuthenticationError:
        sys.exit(f"The server at {base_url} asks for its API key: set OPENAI_API_KEY")
    except NotFoundError as error:
        root = base_url.rstrip("/")
        if root.endswith("/v1"):
            sys.exit(f"The server at {base_url} refuses: {error.message}")
        sys.exit(f"There is no OpenAI API at {base_url}: did you mean {root}/v1?")
    except APIStatusError as error:
        sys.exit(f"The server at {base_url} refuses: {error.message}")
