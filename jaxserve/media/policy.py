"""What the operator lets requests bring, and from where."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxserve.errors import ConfigError
from jaxserve.media.addresses import is_public

if TYPE_CHECKING:
    from jaxserve.config import EngineConfig

MIB = 1024 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaPolicy:
    """Limits for images.  Nothing is fetched and no file is read unless the operator says so."""

    max_images: int = 999  # of a prompt, as in vLLM
    processor_kwargs: Mapping[str, Any] = field(default_factory=dict)  # where a request says nothing else
    allowed_domains: tuple[str, ...] = ()  # hosts of http(s) URLs, in lower case; "*": all public ones
    allowed_directory: Path | None = None  # for file: URLs
    max_bytes: int = 20 * MIB  # of one image's file
    max_total_bytes: int = 128 * MIB  # of all files of a request
    max_total_pixels: int = (
        2**30
    )  # likewise: an empty image of the largest kind is a file of 8 KiB, and takes a second
    fetch_seconds: float = 5.0  # for one image, name look-up and redirects included
    is_allowed_address: Callable[[str], bool] = is_public
    max_queued_bytes: int = 2048 * MIB  # of all images that wait for the engine

    @classmethod
    def of(cls, config: EngineConfig) -> MediaPolicy:
        """The operator's.  Raises ConfigError for a directory that is not there."""
        directory = None
        if config.allowed_local_media_path:  # empty is none, as in vLLM, and not the working directory
            directory = Path(config.allowed_local_media_path).resolve()
            if not directory.is_dir():
                raise ConfigError(
                    f"allowed_local_media_path={config.allowed_local_media_path!r}: not a directory"
                )
        return cls(
            max_images=config.max_images,
            processor_kwargs=config.mm_processor_kwargs,
            allowed_domains=tuple(domain.lower() for domain in config.allowed_media_domains),
            allowed_directory=directory,
            max_queued_bytes=config.max_queued_image_bytes,
        )
