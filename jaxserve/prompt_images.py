"""Images in prompts, for a model that takes them: loaded, and put where their placeholders stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from PIL import Image

from jaxserve.engine.protocol import ImageInput
from jaxserve.errors import RequestError
from jaxserve.inputs import TokenizedPrompt
from jaxserve.media.loader import ImageLoader, ImageSource
from jaxserve.text.image_parts import ImageMarks, images_of

if TYPE_CHECKING:
    from jaxserve.engine.protocol import EngineInfo, ImageInfo
    from jaxserve.media.patches import ProcessedImage
    from jaxserve.media.policy import MediaPolicy
    from jaxserve.text.tokenizer import Tokenizer


class PromptImages:
    """What a front end does about images.

    Raises:
        ConfigError: the policy's mm_processor_kwargs are wrong for this model.
    """

    def __init__(
        self, images: ImageInfo, info: EngineInfo, tokenizer: Tokenizer, policy: MediaPolicy
    ) -> None:
        self._token_id = images.image_token_id
        self._written = tokenizer.decode(images.marker_token_ids, skip_special_tokens=False)
        self._placeholder = tokenizer.decode([images.image_token_id], skip_special_tokens=False)
        self.loader = ImageLoader(
            images.processor,
            policy,
            max_image_tokens=images.max_image_tokens,
            max_prompt_tokens=info.max_model_len,
        )

    def marks(self) -> ImageMarks:
        """For the rendering of one conversation."""
        return ImageMarks(self._written, self._placeholder)

    def of_messages(self, messages: Sequence[Any]) -> list[ImageSource]:
        """The images of a conversation.  Raises RequestError (param "messages") for a part that should be one."""
        return [ImageSource(where, image) for where, image in images_of(messages)]

    def of_prompt(self, prompt: Mapping[str, Any]) -> list[ImageSource]:
        """The images of a prompt in vLLM's form, {"prompt": …, "multi_modal_data": {"image": a PIL image or several}}.

        Raises RequestError (param "multi_modal_data") for anything else in there.
        """
        data = prompt.get("multi_modal_data") or {}
        if not isinstance(data, Mapping):
            raise _wrong_data(f"must be a dict, got {type(data).__name__}")
        for name, value in data.items():
            if name != "image" and value:
                raise _wrong_data(f"has {name!r:.60}: images alone are taken, under 'image'")
        images = data.get("image")
        listed = images if isinstance(images, list | tuple) else [] if images is None else [images]
        for image in listed:
            if not isinstance(image, Image.Image):
                raise _wrong_data(
                    f"'image' must be a PIL image or a list of them, got {type(image).__name__}; LLM.chat takes URLs"
                )
        return [ImageSource(f"multi_modal_data['image'][{k}]", image) for k, image in enumerate(listed)]

    def place(
        self, prompt: TokenizedPrompt, images: Sequence[ProcessedImage], *, param: str
    ) -> TokenizedPrompt:
        """The prompt with `images` in place of its placeholders, in order.

        An image has one placeholder, or already as many as it has tokens.

        Raises RequestError (param `param`) where there are more placeholders or fewer than images.
        """
        token_id, given = self._token_id, prompt.token_ids
        token_ids: list[int] = []
        placed: list[ImageInput] = []
        start = 0
        for image in images:
            try:
                at = given.index(token_id, start)
            except ValueError:
                raise self._wrong_number(prompt, len(images), param) from None
            token_ids += given[start:at]
            placed.append(
                ImageInput(
                    pixels=image.pixels,
                    grid_thw=image.grid_thw,
                    content_hash=image.content_hash,
                    offset=len(token_ids),
                    num_tokens=image.num_tokens,
                )
            )
            whole = [token_id] * image.num_tokens
            token_ids += whole
            end = at + image.num_tokens
            start = end if given[at:end] == whole else at + 1
        if token_id in given[start:]:
            raise self._wrong_number(prompt, len(images), param)
        token_ids += given[start:]
        return TokenizedPrompt(token_ids, prompt.text, tuple(placed), images[0].hold if images else None)

    def check(self, prompt: TokenizedPrompt) -> None:
        """Raise RequestError (param "prompt") for placeholders that no image stands behind."""
        num_placed = sum(image.num_tokens for image in prompt.images)
        if prompt.token_ids.count(self._token_id) != num_placed:
            raise self._wrong_number(prompt, len(prompt.images), "prompt")

    def _wrong_number(self, prompt: TokenizedPrompt, num_images: int, param: str) -> RequestError:
        count = prompt.token_ids.count(self._token_id)
        return RequestError(
            f"The prompt has {count} times {self._placeholder}, which stands for an image, and {num_images} "
            "images. Every image must have one, which the chat template writes for image_url parts (if it knows "
            "of images), and texts must have none.",
            param=param,
        )


def _wrong_data(why: str) -> RequestError:
    return RequestError(f"multi_modal_data {why}.", param="multi_modal_data")
