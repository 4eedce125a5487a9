"""When images are encoded: before the first step that reads some of their tokens, one call of the tower a step."""

from __future__ import annotations

from jaxserve.engine.encoder_cache import EncoderCache
from jaxserve.engine.image_positions import token_grid
from jaxserve.engine.plan import Encode, ImageSpan
from jaxserve.engine.protocol import ImageInput
from jaxserve.engine.sequence import Sequence
from jaxserve.engine.tower_lattice import TowerLattice


class ImagePlanner:
    """The scheduler's side of the encoder: what must be there for a chunk, and what an entry is told of it."""

    def __init__(self, cache: EncoderCache, lattice: TowerLattice) -> None:
        self._cache = cache
        self._lattice = lattice
        self._encodes: list[Encode] = []
        self.num_queries = 0  # images that chunks have begun with
        self.num_hits = 0  # of them those that were there already

    def begin_step(self) -> None:
        """To be called before a step is planned."""
        self._cache.begin_step()
        self._encodes = []

    def reach(self, seq: Sequence, start: int, count: int) -> int:
        """How many of `count` tokens from `start` on can run in this step; what images they have is made ready.

        A chunk ends before an image for which the step has no room any more: in its call of the tower, or in the
        cache.
        """
        if seq.images is None:
            return count
        for image, _ in seq.images.within(start, start + count):
            if self._cache.find(image.content_hash) is not None:
                continue
            if not self._encode(image):
                return max(image.offset - start, 0)
        return count

    def spans(self, seq: Sequence, start: int, count: int) -> tuple[ImageSpan, ...]:
        """What the entry for these tokens, which `reach` has allowed, is told of its images."""
        if seq.images is None:
            return ()
        found = []
        for image, rope_start in seq.images.within(start, start + count):
            pages = self._cache.find(image.content_hash)
            assert pages is not None, "an image was evicted in the step that reads it"
            if start <= image.offset:
                self.num_queries += 1
                self.num_hits += all(encode.image is not image for encode in self._encodes)
            if image.offset + image.num_tokens > start + count:
                self._cache.hold(image.content_hash, seq.seq_id)
            else:
                self._cache.let_go(image.content_hash, seq.seq_id)
            rows, columns = token_grid(image)
            found.append(
                ImageSpan(
                    start=image.offset,
                    num_rows=rows,
                    num_columns=columns,
                    rope_start=rope_start,
                    pages=pages,
                )
            )
        return tuple(found)

    def forget(self, seq: Sequence) -> None:
        """The sequence has ended, or starts over."""
        for image in seq.request.images:
            self._cache.let_go(image.content_hash, seq.seq_id)

    def encodes(self) -> tuple[Encode, ...]:
        """The images of this step's call of the tower."""
        return tuple(self._encodes)

    def take_back(self) -> None:
        """There is no step: nothing is encoded either."""
        for encode in self._encodes:
            self._cache.drop(encode.image.content_hash)
        self._encodes = []

    def _encode(self, image: ImageInput) -> bool:
        sizes = [num_patches(other.image) for other in self._encodes]
        if self._lattice.shape([*sizes, num_patches(image)]) is None:
            return False
        pages = self._cache.make_room(image.content_hash, image.num_tokens)
        if pages is None:
            return False
        self._encodes.append(Encode(image=image, pages=pages))
        return True


def num_patches(image: ImageInput) -> int:
    """Patches that the tower sees."""
    time, rows, columns = image.grid_thw
    return time * rows * columns
