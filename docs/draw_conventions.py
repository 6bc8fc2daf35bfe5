"""Draws docs/conventions.svg with the project's own camera functions, so that the picture cannot say anything else.

python docs/draw_conventions.py docs/conventions.svg
"""

import math
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path

import torch
from torch import Tensor

from fw_train.geometry import decode_pose9, encode_pose9, pixel_directions

WIDTH, HEIGHT = 900, 800
INK, PALE, RED, GREEN, BLUE, ORANGE = "#1f2933", "#9aa5b1", "#c62828", "#2e7d32", "#1565c0", "#d9730d"
COLOURS = (RED, GREEN, BLUE)


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


class View:
    """Looks at a scene (x right, y down, z away) from above and from the side, without perspective."""

    def __init__(self, left: float, top: float, scale: float, yaw_deg: float, pitch_deg: float) -> None:
        yaw, pitch = math.radians(yaw_deg), math.radians(pitch_deg)
        about_y = torch.tensor([[math.cos(yaw), 0, math.sin(yaw)], [0, 1, 0], [-math.sin(yaw), 0, math.cos(yaw)]])
        about_x = torch.tensor(
            [[1, 0, 0], [0, math.cos(pitch), -math.sin(pitch)], [0, math.sin(pitch), math.cos(pitch)]]
        )
        self.rotation = (about_x @ about_y).double()
        self.left, self.top, self.scale = left, top, scale

    def __call__(self, point: Tensor) -> tuple[float, float]:
        x, y, _ = (self.rotation @ point).tolist()
        return self.left + self.scale * x, self.top + self.scale * y

    def line(self, a: Tensor, b: Tensor, colour: str = INK, width: float = 1.5, style: str = "") -> str:
        (x1, y1), (x2, y2) = self(a), self(b)
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}" {style}/>'

    def arrow(self, a: Tensor, b: Tensor, colour: str, width: float = 2.0) -> str:
        (x1, y1), (x2, y2) = self(a), self(b)
        length = math.hypot(x2 - x1, y2 - y1)
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        head = [(x2, y2), (x2 - 9 * ux + 4 * uy, y2 - 9 * uy - 4 * ux), (x2 - 9 * ux - 4 * uy, y2 - 9 * uy + 4 * ux)]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in head)
        return self.line(a, b - (b - a) * 6 / length, colour, width) + f'<polygon points="{corners}" fill="{colour}"/>'

    def dot(self, point: Tensor, colour: str = INK, radius: float = 4) -> str:
        x, y = self(point)
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius}" fill="{colour}"/>'

    def label(
        self, point: Tensor, said: str, colour: str = INK, dx: float = 6, dy: float = -6, bold: bool = True
    ) -> str:
        x, y = self(point)
        return text(x + dx, y + dy, said, colour, bold=bold)


def text(
    x: float, y: float, said: str, colour: str = INK, size: int = 14, bold: bool = False, anchor: str = "start"
) -> str:
    weight = "bold" if bold else "normal"
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}">{escape(said)}</text>'
    )


def frustum(
    view: View, pose: Tensor, depth: float, half_width: float, half_height: float, colour: str
) -> Iterator[str]:
    """The pyramid that a camera [4, 4] sees, up to `depth` along its axis."""
    corners = [vector(x * half_width, y * half_height, depth) for x, y in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
    seen = [pose[:3, :3] @ corner + pose[:3, 3] for corner in corners]
    for corner, following in zip(seen, seen[1:] + seen[:1], strict=True):
        yield view.line(pose[:3, 3], corner, colour, 1)
        yield view.line(corner, following, colour, 1)


def camera_panel() -> Iterator[str]:
    """Axes of a camera, its image, and the ray through a pixel's centre."""
    columns, rows, focal_px = 6, 4, 6.5
    view, eye = View(90, 235, 88, 52, 20), torch.eye(4, dtype=torch.float64)
    depth = 2.3
    step = depth / focal_px  # size of a pixel at that depth
    intrinsics = vector(focal_px, focal_px, columns / 2, rows / 2)
    yield from frustum(view, eye, depth, columns / 2 * step, rows / 2 * step, PALE)
    for column in range(1, columns):
        x = (column - columns / 2) * step
        yield view.line(vector(x, -rows / 2 * step, depth), vector(x, rows / 2 * step, depth), PALE, 0.7)
    for row in range(1, rows):
        y = (row - rows / 2) * step
        yield view.line(vector(-columns / 2 * step, y, depth), vector(columns / 2 * step, y, depth), PALE, 0.7)
    ray = pixel_directions(intrinsics, rows, columns)[1, 4]  # z = 1
    surface = 1.55 * depth * ray
    yield view.line(vector(0, 0, 0), surface, ORANGE, 1.5, 'stroke-dasharray="5 3"')
    yield view.dot(depth * ray, ORANGE, 3)
    yield view.dot(surface, ORANGE, 5)
    yield view.label(surface, "point = depth · ray", ORANGE, dx=-90, dy=-14)
    for axis, (name, colour) in enumerate(zip(("x right", "y down", "z forward"), COLOURS, strict=True)):
        end = torch.zeros(3, dtype=torch.float64)
        end[axis] = 1.15
        yield view.arrow(vector(0, 0, 0), end, colour)
        yield view.label(end, name, colour, dx=(6, -20, -12)[axis], dy=(4, 18, 20)[axis])
    yield view.dot(vector(0, 0, 0))


def numbers_panel() -> Iterator[str]:
    """The 9 numbers of a camera in the first camera's frame."""
    view = View(490, 290, 88, 40, 24)
    axis = vector(-0.10, 0.12, 0.98)
    axis, c = axis / axis.norm(), vector(1.45, -0.75, 1.75)
    turned = vector(torch.dot(c, axis).item(), math.radians(28), math.radians(50))
    given = torch.cat((axis, torch.linalg.cross(c, axis), turned))
    pose, fov = decode_pose9(given)
    d, m, (along, roll, _) = *encode_pose9(pose, fov)[:6].split(3), encode_pose9(pose, fov)[6:]
    centre, origin = pose[:3, 3], vector(0, 0, 0)
    foot = torch.linalg.cross(d, m)
    first = torch.eye(4, dtype=torch.float64)
    yield from frustum(view, first, 0.45, 0.3, 0.2, PALE)
    for axis_index, colour in enumerate(COLOURS):
        yield view.arrow(origin, 0.7 * first[:3, axis_index], colour, 1.5)
    yield view.label(origin, "first camera", INK, dx=8, dy=58, bold=False)
    yield view.line(foot - 0.3 * d, centre + 1.6 * d, PALE, 1.2, 'stroke-dasharray="4 4"')
    yield view.line(origin, foot, INK, 1.5)
    yield view.dot(foot, INK, 3)
    yield view.label((origin + foot) / 2, "|m|", INK, dx=-14, dy=-6)
    yield view.label(foot, "foot = d × m", INK, dx=-6, dy=20, bold=False)
    yield view.arrow(foot, centre, ORANGE, 3)
    yield view.label((foot + centre) / 2, "s", ORANGE, dx=-8, dy=-10)
    half_height = 0.6 * math.tan(fov.item() / 2)
    yield from frustum(view, pose, 0.6, 1.5 * half_height, half_height, INK)
    yield view.arrow(centre, centre + 1.3 * d, BLUE, 2.5)
    yield view.label(centre + 1.3 * d, "d", BLUE, dx=8, dy=4)
    unrolled, _ = decode_pose9(torch.cat((given[:7], vector(0), given[8:])))
    yield view.line(centre, centre + 0.95 * unrolled[:3, 0], PALE, 1.5, 'stroke-dasharray="3 3"')
    yield view.label(centre + 0.95 * unrolled[:3, 0], "x0", PALE, dx=5, dy=-1)
    yield view.arrow(centre, centre + 0.95 * pose[:3, 0], RED)
    yield view.label(centre + 0.95 * pose[:3, 0], "x, turned by roll", RED, dx=6, dy=8)
    yield view.dot(centre)
    yield view.label(centre, "c", INK, dx=-12, dy=20)
    shown = " ".join(f"{value:.2f}" for value in (*d.tolist(), *m.tolist(), along.item(), roll.item(), fov.item()))
    yield text(460, 432, f"this camera: [{shown}]", size=13)
    yield text(460, 452, "d unit axis · m = c × d · s = c · d · roll about d · fov_y", size=13)


def time_panel() -> Iterator[str]:
    """Pixel frames, latent frames, and the sequence of tokens."""
    left, top, box = 40, 545, 30
    yield text(left, top - 14, "pixel frames (T = 4k + 1)", size=13)
    for frame in range(13):
        x = left + frame * (box + 4) + (0 if frame == 0 else 8 * ((frame - 1) // 4 + 1))
        colour = PALE if frame else INK
        yield f'<rect x="{x}" y="{top}" width="{box}" height="{box}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        yield text(x + box / 2, top + 20, str(frame), anchor="middle", size=13)
    yield text(
        left,
        top + 110,
        "latent frames (F = k + 1): the first stands for frame 0 alone, each other one for four",
        size=13,
    )
    for latent in range(4):
        start = left if latent == 0 else left + (4 * latent - 3) * (box + 4) + 8 * latent
        width = box if latent == 0 else 4 * box + 12
        middle = start + width / 2
        yield f'<rect x="{start}" y="{top + 60}" width="{width}" height="{box}" fill="#e3f2fd" stroke="{BLUE}" stroke-width="1.5"/>'
        yield f'<line x1="{middle}" y1="{top + box + 3}" x2="{middle}" y2="{top + 58}" stroke="{BLUE}" stroke-width="1.2"/>'
        yield text(middle, top + 80, str(latent), BLUE, anchor="middle", size=13, bold=True)
    y, x = top + 150, left
    yield text(left, y - 8, "tokens of the geometry branch", size=13)
    parts = (("latent 0: h × w", 130), ("latent 1", 90), ("...", 50), ("latent F-1", 110))
    for said, width in parts:
        yield f'<rect x="{x}" y="{y}" width="{width}" height="{box}" fill="#e3f2fd" stroke="{BLUE}" stroke-width="1.5"/>'
        yield text(x + width / 2, y + 20, said, BLUE, anchor="middle", size=13)
        x += width
    for said, width in (("camera", 70), ("4 registers", 100)):
        yield f'<rect x="{x}" y="{y}" width="{width}" height="{box}" fill="#fff3e0" stroke="{ORANGE}" stroke-width="1.5"/>'
        yield text(x + width / 2, y + 20, said, ORANGE, anchor="middle", size=13)
        x += width
    yield text(
        left,
        y + 52,
        "N = F·h·w video tokens turn with their place (RoPE); the special ones behind them do not turn",
        size=13,
    )


def drawing() -> str:
    """The text of the SVG."""
    parts = [
        text(40, 34, "A camera", size=18, bold=True),
        text(40, 410, "Pixel (column 4, row 1) is seen through its centre, (4.5, 1.5).", size=13),
        text(40, 430, "Depth is measured along z, not along the ray.", size=13),
        text(40, 450, "Intrinsics fx, fy, cx, cy are fractions of width and height.", size=13),
        *camera_panel(),
        text(460, 34, "The 9 numbers of a camera", size=18, bold=True),
        *numbers_panel(),
        text(40, 510, "Time and tokens", size=18, bold=True),
        *time_panel(),
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>', *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(drawing(), encoding="utf-8")
