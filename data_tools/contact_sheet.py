"""Pictures of labels, and how they are laid out on one sheet with text; plain numpy, the same bytes for the same input.

Axes: T frames, H x W pixels. Pictures are uint8 [H, W, 3]; places on them are (column, row).
"""

import struct
import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
Float = NDArray[np.float32]
Mask = NDArray[np.bool_]
Colour = tuple[int, int, int]

BACKGROUND, PAPER, GRID, FAINT, WHITE = (24, 26, 30), (34, 37, 43), (52, 56, 64), (150, 155, 165), (240, 240, 240)
INVALID = (104, 104, 104), (152, 152, 152)  # the two greys of the checks
FIRST, LAST = (60, 140, 255), (255, 180, 50)  # colours of the first and the last camera
CHECK = 4  # pixels along the side of a check
PERCENTILES = 2, 98  # of inverse depth, the ends of the colour map
GLYPH_HEIGHT, GLYPH_WIDTH = 8, 5  # the eighth row is for what hangs below the line
ADVANCE, LEADING = 6, 11  # from letter to letter and from line to line, before scaling
SMALL, LARGE = 2, 3  # text scales
MARGIN = 14
NARROW, WIDE = 320, 640  # panels are enlarged by a whole number up to this width, and reduced so to that
NORMAL_SPAN = 1 / 100  # of the width, between the points whose difference is taken: fewer pixels show the codec's steps
WEDGE_PX, WEDGE_SPREAD = 24, 0.5  # length of the triangle at a camera, and half its width per length
PATH_PADDING_PX = 44

# Colours whose lightness rises evenly, from violet over red and orange to pale yellow, in the manner of "inferno".
_HEAT = np.array(
    [
        *((36, 12, 79), (66, 10, 104), (93, 18, 110), (120, 28, 109), (147, 38, 103), (174, 48, 92)),
        *((199, 62, 76), (221, 81, 58), (237, 105, 37), (248, 133, 15), (252, 165, 10), (250, 198, 45), (242, 230, 97)),
        (252, 255, 164),
    ],
    np.float64,
)

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


class DepthScale(NamedTuple):
    """Inverse depths that take the two ends of the colour map; both 0 where no depth is valid."""

    far: float
    near: float


class Panel(NamedTuple):
    """A picture and the line above it."""

    label: str
    picture: Picture


def depth_scale(depth: Float, valid: Mask) -> DepthScale:
    """The scale of a clip's depth [T, H, W] with validity [T, H, W]."""
    if not valid.any():
        return DepthScale(0.0, 0.0)
    return DepthScale(*map(float, np.percentile(1 / depth[valid].astype(np.float64), PERCENTILES)))


def depth_picture(depth: Float, valid: Mask, scale: DepthScale) -> Picture:
    """Depth [H, W] with validity [H, W], bright where near; grey checks where it is not valid."""
    inverse = 1 / np.where(valid, depth, 1).astype(np.float64)
    return _with_checks(heat_colours(_share(inverse, scale)), valid)


def heat_colours(share: NDArray[np.float64]) -> Picture:
    """Colours [..., 3] of numbers [...] from 0, dark, to 1, bright."""
    at = np.linspace(0, 1, len(_HEAT))
    return np.stack([_byte(np.interp(share, at, channel)) for channel in _HEAT.T], axis=-1)


def depth_legend(scale: DepthScale, width: int, unit: str) -> Picture:
    """A bar of the colours, near to far, with the depths at its ends."""
    picture = blank(30, width)
    if not scale.near:
        write(picture, (0, 0), "no valid depth", SMALL, FAINT)
        return picture
    picture[:10] = heat_colours(np.linspace(1, 0, width))
    near, far = f"{1 / scale.near:.3g}{unit}", f"{1 / scale.far:.3g}{unit}"
    write(picture, (0, 15), near, SMALL, FAINT)
    write(picture, (width - text_width(far, SMALL), 15), far, SMALL, FAINT)
    return picture


def surface_normals(points: Float, valid: Mask, cam_from_first: NDArray[np.float64]) -> tuple[Float, Mask]:
    """Unit normals [H, W, 3] of points [H, W, 3] in the first camera's frame, towards the camera and in its own frame.

    Along each axis the shorter of the two differences counts, so that normals hold up to the edges of things.
    """
    span = max(1, round(NORMAL_SPAN * points.shape[1]))
    points = np.where(valid[..., None], points, 0)  # the others may be NaN
    right, right_valid = _difference(points, valid, span)
    down, down_valid = _difference(points.swapaxes(0, 1), valid.swapaxes(0, 1), span)
    normals = np.cross(down.swapaxes(0, 1), right) @ cam_from_first[:3, :3].T
    length = np.linalg.norm(normals, axis=-1)
    known = right_valid & down_valid.swapaxes(0, 1) & (length > 0)
    return (normals / np.where(known, length, 1)[..., None]).astype(np.float32), known


def normal_picture(normals: Float, valid: Mask) -> Picture:
    """Normals [H, W, 3] as red to the right, green up and blue towards the camera; grey checks where not valid."""
    return _with_checks(_byte(127.5 + 127.5 * normals * np.array((1, -1, -1))), valid)


def path_picture(first_from_cam: NDArray[np.float64], marked: Sequence[int], size: int, smallest: float) -> Picture:
    """Cameras [T, 4, 4] from above, x to the right and z up: a dot each, a triangle along the view of the marked ones.

    The first has a white ring. `smallest` is the length that a path is shown at least as large as.
    """
    picture = np.full((size, size, 3), PAPER, np.uint8)
    centres = first_from_cam[:, (0, 2), 3]
    low, high = centres.min(axis=0), centres.max(axis=0)
    middle, step = (low + high) / 2, grid_step(first_from_cam, size, smallest)
    pixels = _pixels_per_unit(first_from_cam, size, smallest)
    reach = size / pixels / 2
    for axis in (0, 1):
        for number in range(int(np.ceil((middle[axis] - reach) / step)), int((middle[axis] + reach) // step) + 1):
            place = _to_pixel(np.full(2, number * step), middle, pixels, size)[axis]
            at = min(int(place), size - 1)
            picture[(slice(None), at) if axis == 0 else at] = GRID
    dots = _to_pixel(centres, middle, pixels, size)
    colours = [camera_colour(t, len(dots)) for t in range(len(dots))]
    for a, b in pairwise(dots):
        stroke(picture, a, b, 0.7, FAINT)
    for t in marked:
        for a, b in _wedge(dots[t], first_from_cam[t, (0, 2), 2]):
            stroke(picture, a, b, 0.8, colours[t])
    stroke(picture, dots[0], dots[0], 7.5, WHITE)
    stroke(picture, dots[0], dots[0], 5.5, PAPER)
    for dot, colour in zip(dots, colours, strict=True):
        stroke(picture, dot, dot, 3, colour)
    return picture


def grid_step(first_from_cam: NDArray[np.float64], size: int, smallest: float) -> float:
    """The distance between grid lines of `path_picture`: 1, 2 or 5 times a power of ten."""
    wanted = size / _pixels_per_unit(first_from_cam, size, smallest) / 8
    power = 10.0 ** np.floor(np.log10(wanted))
    return float(next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * wanted))


def camera_colour(frame: int, frames: int) -> Colour:
    """The colour of a camera's dot, from FIRST to LAST."""
    share = frame / max(frames - 1, 1)
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(FIRST, LAST, strict=True))
    return red, green, blue


def stroke(
    picture: Picture, start: NDArray[np.float64], end: NDArray[np.float64], radius: float, colour: Colour
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
    region[...] = _byte(region + cover * (np.array(colour) - region))


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
    return _byte(tiles.mean(axis=(1, 3)))


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
    rows = picture.reshape(height, 3 * width)
    filtered = np.full((height, 1 + 3 * width), 2, np.uint8)  # filter 2: each byte less the one above it
    filtered[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros((1, 3 * width), np.uint8))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(filtered.tobytes(), 6)), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


def _share(inverse: NDArray[np.float64], scale: DepthScale) -> NDArray[np.float64]:
    if scale.near <= scale.far:
        return np.full(inverse.shape, 0.5)
    return np.clip((inverse - scale.far) / (scale.near - scale.far), 0, 1)


def _difference(points: Float, valid: Mask, span: int) -> tuple[NDArray[np.float64], Mask]:
    """The shorter of the differences to the points `span` columns to the right and to the left, both rightwards."""
    steps = points[:, span:].astype(np.float64) - points[:, :-span]
    length = np.where(valid[:, span:] & valid[:, :-span], np.linalg.norm(steps, axis=-1), np.inf)
    ahead = np.pad(length, ((0, 0), (0, span)), constant_values=np.inf)
    behind = np.pad(length, ((0, 0), (span, 0)), constant_values=np.inf)
    edge, sides = np.zeros((len(points), span, 3)), (ahead <= behind)[..., None]
    shorter = np.where(sides, np.concatenate((steps, edge), axis=1), np.concatenate((edge, steps), axis=1))
    return shorter, np.isfinite(np.minimum(ahead, behind))


def _with_checks(picture: Picture, valid: Mask) -> Picture:
    rows, columns = np.indices(valid.shape) // CHECK
    checks = np.array(INVALID, np.uint8)[(rows + columns) % 2]
    return np.where(valid[..., None], picture, checks)


def _pixels_per_unit(first_from_cam: NDArray[np.float64], size: int, smallest: float) -> float:
    extent = np.ptp(first_from_cam[:, (0, 2), 3], axis=0).max()
    return float((size - 2 * PATH_PADDING_PX) / max(extent, smallest))


def _to_pixel(
    centres: NDArray[np.float64], middle: NDArray[np.float64], pixels: float, size: int
) -> NDArray[np.float64]:
    """Columns and rows [..., 2] of places (x, z) [..., 2] seen from above."""
    return size / 2 + (centres - middle) * pixels * np.array((1, -1))


def _wedge(
    apex: NDArray[np.float64], direction: NDArray[np.float64]
) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """The sides of a triangle that opens along a direction (x, z); shorter where the camera looks up or down."""
    ahead = WEDGE_PX * direction * np.array((1, -1))
    across = WEDGE_SPREAD * WEDGE_PX * np.array((direction[1], direction[0])) / max(np.hypot(*direction), 1e-6)
    corners = apex, apex + ahead - across, apex + ahead + across
    return [(corners[i], corners[i - 1]) for i in range(3)]


def _byte(values: NDArray[np.floating]) -> Picture:
    return np.rint(values).astype(np.uint8)
