"""Where the images of a prompt stand: among its tokens, and in M-RoPE's count of positions."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from math import isqrt

from jaxserve.engine.pages import PageHash
from jaxserve.engine.protocol import ImageInput


class ImagePositions:
    """The images of one sequence.

    To rotary embeddings an image begins where the text before it ends, its tokens' rows and columns are counted from
    there, and the text goes on behind its longer side: so positions of rotation fall behind those in the sequence.
    """

    def __init__(self, images: tuple[ImageInput, ...]) -> None:
        self._images = images
        # Asked about in every step, and for every page: of hundreds of images, most are elsewhere.
        self._starts = [image.offset for image in images]
        self._ends = [image.offset + image.num_tokens for image in images]
        self._rope_starts: list[int] = []
        self._deltas: list[int] = []  # rotary minus plain position of the text behind each image
        delta = 0
        for image in images:
            rope_start = image.offset + delta
            delta += max(token_grid(image)) - image.num_tokens
            self._rope_starts.append(rope_start)
            self._deltas.append(delta)

    def within(self, start: int, end: int) -> list[tuple[ImageInput, int]]:
        """The images with tokens between these positions, in order, each with the rotary position of its first one."""
        those = slice(bisect_right(self._ends, start), bisect_left(self._starts, end))
        return list(zip(self._images[those], self._rope_starts[those], strict=True))

    def rope_delta(self, position: int) -> int:
        """Rotary minus plain position of text that stands at `position`, or of the text before an image there."""
        past = bisect_right(self._ends, position)
        return self._deltas[past - 1] if past else 0

    def mixed_into(self, parent: PageHash, start: int, end: int) -> PageHash:
        """What to take for a page's parent, so that its name tells which images its placeholders stand for."""
        inside = self.within(start, end)
        if not inside:
            return parent
        told = [f"{image.content_hash}@{start - image.offset}" for image, _ in inside]
        return hashlib.blake2b(parent + " ".join(told).encode(), digest_size=16).digest()


def token_grid(image: ImageInput) -> tuple[int, int]:
    """Tokens down and across."""
    time, rows, columns = image.grid_thw
    assert time == 1, "an image has one moment"
    merge = isqrt(rows * columns // image.num_tokens)
    assert rows * columns == image.num_tokens * merge * merge, "an image's tokens are not its patches merged"
    return rows // merge, columns // merge
