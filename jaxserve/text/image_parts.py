"""Images among the parts of chat messages: what a request may send, and how they pass through a template."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxserve.errors import RequestError

# Kinds of image parts, and the key of each that holds the image.  The second is the form of OpenAI's newer API,
# the third is for Python: its value is a PIL image.
_KEYS = {"image_url": "image_url", "input_image": "image_url", "image_pil": "image_pil"}

_LOADED = "data:,"  # in place of an image's URL

_OTHER_MEDIA = ("video_url", "audio_url", "input_audio", "image_embeds", "audio_embeds", "video", "audio")


def image_kind(part: Mapping[str, Any]) -> str | None:
    """The kind of an image part, by its type or, as vLLM allows, by the key alone; None: it is none."""
    kind = part.get("type")
    if kind is None:
        return next((key for key in ("image_url", "image_pil") if key in part), None)
    return kind if isinstance(kind, str) and kind in _KEYS else None


def images_of(messages: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Each image of a conversation: its place (messages[0].content[1]) and what it is, a URL or a PIL image.

    Raises RequestError (param "messages") for an image part without either.  Other parts are not looked at.
    """
    for where, part in _parts(messages):
        kind = image_kind(part)
        if kind is not None:
            yield where, _image_of(part, kind, where)


def unread_image_fields(messages: Sequence[Any]) -> Iterator[str]:
    """The places of what image parts say beside the image: `detail` means nothing to these models, and images
    are known by their contents, whatever `uuid` they have."""
    for where, part in _parts(messages):
        if image_kind(part) is None:
            continue
        inner = part.get("image_url")
        for holder, path in ((part, where), (inner, f"{where}.image_url")):
            if not isinstance(holder, Mapping):
                continue
            if holder.get("detail") not in (None, "auto"):
                yield f"{path}.detail"
            if holder.get("uuid") is not None:
                yield f"{path}.uuid"


def forget_images(messages: Sequence[Any]) -> int:
    """Let go of the URLs of images that have been loaded, in place: of data: URLs there may be megabytes.

    The number of their characters.
    """
    num_characters = 0
    for where, part in _parts(messages):
        kind = image_kind(part)
        if kind is not None and isinstance(part, dict):
            num_characters += len(_image_of(part, kind, where))
            part[_KEYS[kind]] = _LOADED
    return num_characters


def other_media(kind: str, where: str) -> RequestError:
    """The refusal of a part that a model for images does not take."""
    what = "is not supported" if kind in _OTHER_MEDIA else "is not known"
    return RequestError(
        f"{where} is of type {kind!r:.60}, which {what}; this model takes text and images (image_url).",
        param="messages",
    )


class ImageMarks:
    """Numbers the images of one conversation, and finds out in which order a prompt has them.

    Where a template writes parts it gets {"type": "image"}.  Where it writes text, or a message's content is made
    text before, a mark stands for the image that nobody can guess; in the prompt it becomes `written`.

    Args:
        written: what stands for one image in a prompt, e.g. <|vision_start|><|image_pad|><|vision_end|>.
        reserved: the part of it that texts must not have, e.g. <|image_pad|>.
    """

    def __init__(self, written: str, reserved: str) -> None:
        self.reserved = reserved
        self._written = written
        self._name = f"JAXSERVE-IMAGE-{secrets.token_hex(8)}-"
        self._mark = re.compile(re.escape(self._name) + r"(\d+)\.")
        self._num_images = 0
        self.order: list[int] = []  # of the images in the prompt, by their numbers; after take_from

    def new_part(self) -> dict[str, Any]:
        """The content part of the next image."""
        self._num_images += 1
        return {"type": "image", "text": f"{self._name}{self._num_images - 1}."}

    def take_from(self, conversation: Sequence[dict[str, Any]]) -> None:
        """Note the order in which a template will see the images; their parts lose their marks, in place."""
        for message in conversation:
            content = message["content"]
            for part in [{"text": content}] if isinstance(content, str) else content or ():
                self.order.extend(map(int, self._mark.findall(part["text"])))
                if part.get("type") == "image":
                    del part["text"]

    def write(self, prompt: str) -> str:
        """The prompt with what stands for an image in place of each mark."""
        return self._mark.sub(lambda _: self._written, prompt)


def _parts(messages: Sequence[Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for i, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            for k, part in enumerate(content):
                if isinstance(part, Mapping):
                    yield f"messages[{i}].content[{k}]", part


def _image_of(part: Mapping[str, Any], kind: str, where: str) -> Any:
    key = _KEYS[kind]
    value = part.get(key)
    if kind == "image_pil":
        from PIL import Image  # the caller, who has such an image, has paid for the import

        if not isinstance(value, Image.Image):
            raise RequestError(
                f"{where}.image_pil must be a PIL image, which Python alone can send; send an image_url instead.",
                param="messages",
            )
        return value
    url = value.get("url") if isinstance(value, Mapping) else value
    if not isinstance(url, str) or not url:
        hint = " (a uuid alone does not say which image it is)" if part.get("uuid") is not None else ""
        raise RequestError(
            f'{where}.{key} must be a URL or an object with one, {{"url": "data:image/png;base64,…"}}{hint}.',
            param="messages",
        )
    return url
