"""Lines, text and layout on pictures, and their PNG bytes; plain numpy, the same bytes for the same input.

Pictures are uint8 [H, W, 3]; places on them are (column, row).
"""

import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

BACKGROUND, PAPER, GRID, FAINT, WHITE = (24, 26, 30), (34, 37, 43), (52, 56, 64), (150, 155, 165), (240, 240, 240)
GLYPH_HEIGHT, GLYPH_WIDTH = 8, 5  # the eighth row is for what hangs below the line
ADVANCE, LEADING = 6, 11  # from letter to letter and from line to line, before scaling
SMALL, LARGE = 2, 3  # text scales
MARGIN = 14
NARROW, WIDE = 320, 640  # panels are enlarged by a whole number up to this width, and reduced so to that

# The printable ASCII characters from space to ~, each five columns from left to right, the lowest bit being the top row.
_GLYPHS = """
0000000000 00005F0000 0007000700 147F147F14 242A7F2A12 2313086462 3649552250 0000070000 001C224100 0041221C00
14083E0814 08083E0808 0080600000 0808080808 0060600000 2010080402 3E5149453E 00427F4000 4261514946 2141454B31
1814127F10 2745454539 3C4A494930 0171090503 3649494936 064949291E 0036360000 0080660000 0814224100 1414141414
0041221408 0201510906 324979413E 7E1111117E 7F49494936 3E41414122 7F4141221C 7F49494941 7F09090901 3E4149497A
7F0808087F 00417F4100 2040413F01 7F08142241 7F40404040 7F020C027F 7F0408107F 3E4141413E 7F09090906 3E4151215E
7F09192946 4649494931 01017F0101 3F4040403F 1F2040201F 3F4038403F 6314081463 0708700807 6151494543 007F414100
0204081020 0041417F00 0402010204 4040404040 0001020400 2054545478 7F48444438 3844444420 384444487F 3854545418
087E090102 18A4A4A478 7F08040478 00447D4000 4080847D00 7F10284400 00417F4000 7C04180478 7C08040478 3844444438
FC24242418 18242424FC 7C08040408 4854545420 043F444020 3C4040207C 1C2040201C 3C4030403C 4428102844 1CA0A0A07C
4464544C44 0008364100 00007F0000 0041360800 1008081008
"""
_COLUMNS = np.frombuffer(bytes.fromhex(_GLYPHS), np.uint8).reshape(-1, GLYPH_WIDTH, 1)
_FONT = np.unpackbits(_COLUMNS, axis=2, count=GLYPH_HEIGHT, bitorder="little").swapaxes(1, 2).astype(bool)  # [95, 8, 5]


class Panel(NamedTuple):
    """A picture and the line above it."""

    label: str
    picture: Picture


def stroke(
    picture: Picture, start: NDArray[np.floating], end: NDArray[np.floating], radius: float, colour: Colour
) -> None:
    """Draws a line with round ends; where it starts and ends at the same place, a dot."""
    height, width = picture.shape[:2]
    left, top = np.maximum(np.floor(np.minimum(start, end) - radius - 1), 0).astype(int)
    right, bottom = np.minimum(np.ceil(np.maximum(start, end) + radius + 1), (width, height)).astype(int)
    if left >= right or top >= bottom:
        return
    columns, rows = np.arange(left, right) + 0.5 - start[0], np.arange(top, bottom)[:, None] + 0.5 - start[1]
    dx, dy = end - start
    along = np.clip((columns * dx + rows * dy) / max(dx * dx + dy * dy, 1e-12), 0, 1)
    distance = np.hypot(columns - along * dx, rows - along * dy)
    cover = np.clip(radius + 0.5 - distance, 0, 1)[..., None]
    region = picture[top:bottom, left:right]
    region[...] = to_bytes(region + cover * (np.array(colour) - region))


def write(picture: Picture, place: tuple[int, int], text: str, scale: int, colour: Colour) -> None:
    """Writes a line whose upper left corner lies at `place`; what does not fit is cut, what is not ASCII becomes ?."""
    column, row = place
    for letter in text:
        code = ord(letter) - ord(" ")
        glyph = _FONT[code if 0 <= code < len(_FONT) else ord("?") - ord(" ")]
        region = picture[row : row + scale * GLYPH_HEIGHT, column : column + scale * GLYPH_WIDTH]
        region[enlarge(glyph, scale)[: region.shape[0], : region.shape[1]]] = colour
        column += scale * ADVANCE


def text_width(text: str, scale: int) -> int:
    return len(text) * scale * ADVANCE - scale


def wrap(text: str, width: int, scale: int, most_lines: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide; what is left over ends in dots."""
    letters = max(4, (width + scale) // (scale * ADVANCE))
    lines: list[str] = []
    rest = " ".join(text.split())
    while rest and len(lines) < most_lines:
        space = rest.rfind(" ", 0, letters + 1)
        cut = len(rest) if len(rest) <= letters else space if space > 0 else letters
        lines.append(rest[:cut])
        rest = rest[cut:].lstrip()
    if rest:
        lines[-1] = lines[-1][: letters - 3].rstrip() + "..."
    return lines


def fit(picture: Picture) -> Picture:
    """Enlarges a narrow picture, and reduces a wide one, by a whole number."""
    height, width = picture.shape[:2]
    factor = -(-width // WIDE)
    if factor == 1:
        return enlarge(picture, max(1, NARROW // width))
    height, width = height // factor, width // factor
    tiles = picture[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return to_bytes(tiles.mean(axis=(1, 3)))


def enlarge(picture: NDArray[np.generic], factor: int) -> NDArray:
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def blank(height: int, width: int) -> Picture:
    return np.full((height, width, 3), BACKGROUND, np.uint8)


def labelled(panel: Panel) -> Picture:
    """A panel with its line above it."""
    picture = blank(panel.picture.shape[0] + SMALL * LEADING, panel.picture.shape[1])
    write(picture, (0, 0), panel.label, SMALL, FAINT)
    picture[SMALL * LEADING :] = panel.picture
    return picture


def beside(pictures: Sequence[Picture]) -> Picture:
    """Pictures from left to right, their upper edges in line."""
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + MARGIN * (len(pictures) - 1)
    sheet, at = blank(height, width), 0
    for picture in pictures:
        sheet[: picture.shape[0], at : at + picture.shape[1]] = picture
        at += picture.shape[1] + MARGIN
    return sheet


def below(pictures: Sequence[Picture], gap: int = MARGIN) -> Picture:
    """Pictures from top to bottom, their left edges in line."""
    height = sum(picture.shape[0] for picture in pictures) + gap * (len(pictures) - 1)
    sheet, at = blank(height, max(picture.shape[1] for picture in pictures)), 0
    for picture in pictures:
        sheet[at : at + picture.shape[0], : picture.shape[1]] = picture
        at += picture.shape[0] + gap
    return sheet


def text_picture(lines: Sequence[str], width: int, scale: int, colour: Colour) -> Picture:
    """Lines of text, cut at `width`."""
    picture = blank(scale * LEADING * len(lines), width)
    for number, line in enumerate(lines):
        write(picture, (0, scale * LEADING * number), line, scale, colour)
    return picture


def framed(picture: Picture) -> Picture:
    """A picture with a margin all around."""
    return np.stack(
        [np.pad(picture[..., channel], MARGIN, constant_values=BACKGROUND[channel]) for channel in range(3)], axis=-1
    )


def png_bytes(picture: Picture) -> bytes:
    """A PNG file, 8 bits a channel."""
    height, width = picture.shape[:2]
    return _png(picture.reshape(height, 3 * width), width, depth=8, colour=2)


def gray16_png_bytes(values: NDArray[np.uint16]) -> bytes:
    """A PNG file with one channel [H, W] of 16 bits."""
    height, width = values.shape
    return _png(values.astype(">u2").view(np.uint8).reshape(height, 2 * width), width, depth=16, colour=0)


def _png(rows: NDArray[np.uint8], width: int, depth: int, colour: int) -> bytes:
    """A PNG file of rows of bytes, `depth` bits a channel; `colour` is 0 for gray and 2 for RGB."""
    height, length = rows.shape
    filtered = np.full((height, 1 + length), 2, np.uint8)  # filter 2: each byte less the one above it
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros((1, length), np.uint8))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def to_bytes(values: NDArray[np.floating]) -> Picture:
    """Channel values from 0 to 255, rounded."""
    return np.rint(values).astype(np.uint8)
