"""Two photographs, in every form in which images come."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

DATA = Path(__file__).parents[1] / "data" / "images"
CAT, ROCKET = DATA / "cat.png", DATA / "rocket.jpg"

ORIENTATION = 0x0112  # EXIF's tag


def file_of(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image as a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(orientation: int, kind: str = "JPEG") -> bytes:
    """The cat as a file with an EXIF orientation."""
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return file_of(Image.open(CAT), kind, exif=exif)


def _with_alpha() -> bytes:
    image = Image.open(CAT).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return file_of(image)


def _palette_with_transparency() -> bytes:
    image = Image.open(CAT).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    return file_of(image, transparency=3)


def _animation() -> bytes:
    cat, rocket = Image.open(CAT), Image.open(ROCKET)
    return file_of(cat, "GIF", save_all=True, append_images=[rocket.resize(cat.size)])


FORMS: dict[str, Callable[[], bytes]] = {
    "cat": CAT.read_bytes,
    "rocket": ROCKET.read_bytes,
    "alpha": _with_alpha,
    "grey and alpha": lambda: file_of(Image.open(io.BytesIO(_with_alpha())).convert("LA")),
    "palette": lambda: file_of(Image.open(CAT).convert("P", palette=Image.Palette.ADAPTIVE)),
    "palette with transparency": _palette_with_transparency,
    "grey": lambda: file_of(Image.open(CAT).convert("L")),
    "two colours": lambda: file_of(Image.open(CAT).convert("1")),
    "cmyk": lambda: file_of(Image.open(CAT).convert("CMYK"), "TIFF"),
    "animation": _animation,
    "turned": lambda: turned(6),
    "tiny": lambda: file_of(Image.open(CAT).crop((60, 60, 65, 63))),
    "thin": lambda: file_of(Image.open(CAT).resize((301, 9))),
}
"""Name → the bytes of a file.  Lossless forms but for rocket and turned."""
