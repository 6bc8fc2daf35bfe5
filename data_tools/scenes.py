"""Random scenes: a stage with spheres and boxes on it, its surroundings and light, a camera path and a true caption."""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.paths import PATH_KINDS, CameraPath, PathKind, describe_path, sample_path, stage_from_cam, stage_right
from data_tools.scene_render import Light, Surface, View, render_labels
from data_tools.scene_shapes import Box, Level, Sphere, Vector
from data_tools.scene_textures import Pattern, Texture

Surroundings = Literal["room", "courtyard", "dome", "sky"]
Rest = Literal["still", "slides", "bounces", "turns"]

STAGE_RADIUS_M = 2.3  # objects stay within, cameras outside
DOME_RADIUS_M = 26.0
GRAVITY = 9.81
GLOW = 0.6
LEAST_SEEN = 0.002  # share of the pixels above which the caption names an object

# Linear RGB.
COLOURS: dict[str, Vector] = {
    "red": (0.72, 0.05, 0.04),
    "orange": (0.86, 0.27, 0.03),
    "yellow": (0.88, 0.62, 0.06),
    "green": (0.10, 0.42, 0.09),
    "turquoise": (0.04, 0.47, 0.45),
    "blue": (0.04, 0.15, 0.62),
    "purple": (0.25, 0.08, 0.48),
    "pink": (0.85, 0.27, 0.42),
}
CREAM: Vector = (0.85, 0.80, 0.68)
PALETTES: tuple[tuple[Vector, Vector], ...] = (  # two tones of a floor
    ((0.52, 0.43, 0.30), (0.24, 0.17, 0.11)),  # sand
    ((0.46, 0.48, 0.50), (0.13, 0.15, 0.18)),  # slate
    ((0.38, 0.47, 0.30), (0.14, 0.22, 0.12)),  # moss
    ((0.54, 0.36, 0.27), (0.25, 0.12, 0.08)),  # clay
    ((0.45, 0.42, 0.55), (0.19, 0.17, 0.28)),  # lilac
)
WALLS: tuple[tuple[Vector, Vector], ...] = (
    ((0.46, 0.20, 0.14), (0.62, 0.57, 0.50)),
    ((0.62, 0.60, 0.55), (0.44, 0.42, 0.40)),
    ((0.36, 0.45, 0.50), (0.58, 0.60, 0.60)),
    ((0.60, 0.50, 0.30), (0.70, 0.66, 0.55)),
)
SKIES: tuple[tuple[Vector, Vector], ...] = (  # horizon, zenith
    ((0.62, 0.76, 0.90), (0.10, 0.27, 0.66)),
    ((0.88, 0.66, 0.48), (0.20, 0.26, 0.55)),
    ((0.74, 0.80, 0.84), (0.30, 0.42, 0.58)),
)


DOMES: tuple[tuple[Vector, Vector], ...] = (
    ((0.80, 0.42, 0.30), (0.22, 0.10, 0.34)),
    ((0.48, 0.74, 0.62), (0.04, 0.24, 0.33)),
    ((0.82, 0.62, 0.28), (0.36, 0.12, 0.10)),
    ((0.52, 0.64, 0.86), (0.10, 0.13, 0.42)),
)


class Motion(NamedTuple):
    """How an object moves: along `way` [m] over the clip, up to `height_m` again and again, or about y."""

    rest: Rest = "still"
    way: Vector = (0.0, 0.0, 0.0)
    height_m: float = 0.0
    turn_rad_s: float = 0.0
    phrase: str = ""


class SceneObject(NamedTuple):
    """A sphere or box where it stands at the beginning."""

    name: str
    shape: Sphere | Box
    texture: Texture
    motion: Motion


class Scene(NamedTuple):
    surroundings: tuple[Surface, ...]
    objects: tuple[SceneObject, ...]
    light: Light
    path: CameraPath
    fov_y_rad: float  # the same for both orientations, so that a network need not tell them apart to know it
    place: str


def sample_scene(seed: int, index: int, moving: float, sky: float, paths: Sequence[PathKind] = PATH_KINDS) -> Scene:
    """Scene `index` of the series `seed`; it has moving objects, or a sky without depth, with these probabilities."""
    rng = np.random.default_rng((seed, index))
    moves, open_sky = rng.random(2) < (moving, sky)
    others: tuple[Surroundings, ...] = ("room", "courtyard", "dome")
    kind: Surroundings = "sky" if open_sky else others[rng.integers(len(others))]
    path = sample_path(rng, paths)
    surroundings, light, place = _sample_surroundings(rng, kind, path.azimuth_rad)
    objects = _sample_objects(rng, moves, path.azimuth_rad)
    return Scene(surroundings, objects, light, path, math.radians(rng.uniform(42, 52)), place)


def surfaces_at(scene: Scene, progress: float, seconds: float) -> list[Surface]:
    """All surfaces at a moment, the objects first; `progress` runs from 0 to 1 over the clip."""
    moved = [Surface(_moved(thing.shape, thing.motion, progress, seconds), thing.texture) for thing in scene.objects]
    return [*moved, *scene.surroundings]


def views(scene: Scene, frames: int, fps: float, height: int, width: int) -> list[View]:
    """The camera of every frame."""
    focal_px = height / (2 * math.tan(scene.fov_y_rad / 2))
    return [View(pose, focal_px, height, width) for pose in stage_from_cam(scene.path, frames, fps)]


def caption(scene: Scene, frames: int, fps: float, height: int, width: int, *, camera: bool = True) -> str:
    """A sentence that names the objects that can be seen, what moves and, unless it leaves that out, what the camera does."""
    scale = 48 / max(height, width)
    small = (max(2, round(height * scale)), max(2, round(width * scale)))
    seen = np.zeros(len(scene.objects), bool)
    cameras = views(scene, frames, fps, *small)
    for frame in sorted({round(u * (frames - 1)) for u in (0, 0.25, 0.5, 0.75, 1)}):
        surfaces = surfaces_at(scene, frame / max(frames - 1, 1), frame / fps)
        surface = render_labels(surfaces, cameras[frame]).surface
        share = np.bincount(surface.ravel(), minlength=len(surfaces)) / surface.size
        seen |= share[: len(seen)] > LEAST_SEEN
    named = [thing for thing, visible in zip(scene.objects, seen, strict=True) if visible]
    things = _listed([f"{'an' if thing.name[0] in 'aeiou' else 'a'} {thing.name}" for thing in named]) or "nothing"
    motions = [f"the {thing.name} {thing.motion.phrase}" for thing in named if thing.motion.rest != "still"]
    path = [describe_path(scene.path)] if camera else []
    sentence = ", ".join([f"{things} {scene.place}", *motions, *path])
    return sentence[0].upper() + sentence[1:] + "."


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def _moved(shape: Sphere | Box, motion: Motion, progress: float, seconds: float) -> Sphere | Box:
    x, y, z = (at + progress * step for at, step in zip(shape.centre, motion.way, strict=True))
    if motion.rest == "bounces":
        # Thrown up with the speed that just reaches height_m, again on every landing.
        speed = math.sqrt(2 * GRAVITY * motion.height_m)
        since = seconds % (2 * speed / GRAVITY)
        y -= speed * since - GRAVITY * since**2 / 2
    if isinstance(shape, Box):
        return shape._replace(centre=(x, y, z), yaw_rad=shape.yaw_rad + motion.turn_rad_s * seconds)
    return shape._replace(centre=(x, y, z))


def _sample_objects(rng: np.random.Generator, moves: bool, azimuth_rad: float) -> tuple[SceneObject, ...]:
    count = int(rng.integers(3, 7))
    colours = rng.permutation(list(COLOURS))
    movers = int(rng.integers(1, 3)) if moves else 0
    objects: list[SceneObject] = []
    taken: list[tuple[NDArray[np.float64], float]] = []
    for number in range(count):
        thing = _sample_object(rng, str(colours[number]), number < movers, azimuth_rad)
        radius = _ground_radius(thing.shape)
        for _ in range(100):
            middle = rng.uniform(-STAGE_RADIUS_M, STAGE_RADIUS_M, 2)
            spots = [middle + u * np.array(thing.motion.way)[[0, 2]] for u in (0, 0.25, 0.5, 0.75, 1)]
            within = all(np.hypot(*spot) + radius <= STAGE_RADIUS_M for spot in spots)
            if within and all(np.hypot(*(a - b)) > radius + other + 0.05 for a in spots for b, other in taken):
                taken += [(spot, radius) for spot in spots]
                centre = (float(middle[0]), thing.shape.centre[1], float(middle[1]))
                objects.append(thing._replace(shape=thing.shape._replace(centre=centre)))
                break
    return tuple(objects)


def _ground_radius(shape: Sphere | Box) -> float:
    return shape.radius if isinstance(shape, Sphere) else math.hypot(shape.half[0], shape.half[2])


def _sample_object(rng: np.random.Generator, colour: str, moves: bool, azimuth_rad: float) -> SceneObject:
    ball = rng.random() < 0.5
    shape: Sphere | Box
    if ball:
        radius = float(rng.uniform(0.28, 0.72))
        shape = Sphere((0.0, -radius, 0.0), radius)
        size = "large " if radius > 0.58 else "small " if radius < 0.38 else ""
    else:
        x, y, z = (float(value) for value in rng.uniform(0.22, 0.55, 3) * (1, 1.6, 1))
        shape = Box((0.0, -y, 0.0), (x, y, z), float(rng.uniform(0, math.pi)))
        size = "tall " if y > 1.5 * max(x, z) else "flat " if 1.5 * y < min(x, z) else ""
    patterns: tuple[Pattern, ...] = ("plain", "plain", "striped", "checkered", "spotted")
    pattern = patterns[rng.integers(len(patterns))]
    second = CREAM if rng.random() < 0.6 else _scaled(COLOURS[colour], 0.3)
    offset = (0.5 + float(rng.uniform(0, 0.4)), 0.27, float(rng.uniform(0, 1)))
    texture = Texture(pattern, COLOURS[colour], second, float(rng.uniform(0.16, 0.26)), offset)
    motion = _sample_motion(rng, ball, azimuth_rad) if moves else Motion()
    look = "" if pattern == "plain" else f"{pattern} "
    return SceneObject(f"{size}{colour} {look}{'sphere' if ball else 'box'}", shape, texture, motion)


def _sample_motion(rng: np.random.Generator, ball: bool, azimuth_rad: float) -> Motion:
    choice = rng.random()
    if choice < 0.5:
        right = stage_right(azimuth_rad)
        ahead = (-right[2], 0.0, right[0])
        phrase, way = (
            ("slides to the right", right),
            ("slides to the left", _scaled(right, -1)),
            ("slides away from the camera", ahead),
            ("slides towards the camera", _scaled(ahead, -1)),
        )[rng.integers(4)]
        return Motion("slides", _scaled(way, float(rng.uniform(0.9, 1.6))), phrase=phrase)
    if ball or choice < 0.75:
        return Motion("bounces", height_m=float(rng.uniform(0.35, 0.9)), phrase="bounces")
    speed = float(rng.uniform(1.0, 2.2)) * (1 if rng.random() < 0.5 else -1)
    return Motion("turns", turn_rad_s=speed, phrase="turns on the spot")


def _sample_surroundings(
    rng: np.random.Generator, kind: Surroundings, azimuth_rad: float
) -> tuple[tuple[Surface, ...], Light, str]:
    floor, floor_name = _sample_floor(rng)
    skies = SKIES if kind == "sky" else DOMES
    horizon, zenith = skies[rng.integers(len(skies))]
    shift = (float(rng.uniform(0, 9)), float(rng.uniform(0, 9)), float(rng.uniform(0, 9)))
    wall = Texture("brick" if rng.random() < 0.6 else "plain", *WALLS[rng.integers(len(WALLS))], 0.9, shift)
    wall_name = "a brick wall" if wall.pattern == "brick" else "a plain wall"
    # The sun stands beside or behind the first camera, so that one sees lit sides and shadows both.
    sun = azimuth_rad + float(rng.uniform(0.6, 1.8)) * (1 if rng.random() < 0.5 else -1)
    steep = float(rng.uniform(0.65, 1.05))
    # On the right it is always evening: colours alone tell a network of minutes how far the camera has turned.
    glow = _scaled(stage_right(azimuth_rad), GLOW)
    sunlight = Light(
        _scaled((math.cos(steep) * math.sin(sun), -math.sin(steep), -math.cos(steep) * math.cos(sun)), 120),
        1.1,
        _mixed((0.36, 0.36, 0.36), zenith, 0.3),
        horizon,
        42,
        glow,
    )
    if kind == "room":
        half, height = float(rng.uniform(7.0, 8.0)), float(rng.uniform(3.6, 4.4))
        lamp = azimuth_rad + float(rng.uniform(-1.3, 1.3))
        light = Light(
            (2.6 * math.sin(lamp), 0.35 - height, -2.6 * math.cos(lamp)),
            0.8,
            (0.40, 0.38, 0.36),
            (0.25, 0.24, 0.23),
            60,
            glow,
        )
        walls = Surface(Box((0.0, -height / 2, 0.0), (half, height, half), azimuth_rad + 0.4, True), wall, casts=False)
        ceiling = Surface(Level(-height, 1.0), Texture("plain", CREAM, CREAM), casts=False)
        return (floor, walls, ceiling), light, f"on {floor_name} in a room with {wall_name.replace('a ', '')}s"
    if kind == "courtyard":
        back = _wall(azimuth_rad, float(rng.uniform(3.0, 4.2)), float(rng.uniform(1.0, 1.6)), wall)
        return (floor, back, _dome("panels", horizon, zenith)), sunlight, f"on {floor_name} in front of {wall_name}"
    if kind == "dome":
        return (floor, _dome("panels", horizon, zenith)), sunlight, f"on {floor_name} under a painted dome"
    return (floor, _dome("sky", horizon, zenith)), sunlight, f"on {floor_name} under an open sky"


def _wall(azimuth_rad: float, behind_m: float, half_height_m: float, texture: Texture) -> Surface:
    """A free-standing wall behind the stage as the first camera sees it."""
    ahead = (-math.sin(azimuth_rad), math.cos(azimuth_rad))
    centre = (behind_m * ahead[0], -half_height_m, behind_m * ahead[1])
    return Surface(Box(centre, (5.5, half_height_m, 0.15), -azimuth_rad), texture)


def _dome(pattern: Pattern, horizon: Vector, zenith: Vector) -> Surface:
    shape = Sphere((0.0, 0.0, 0.0), DOME_RADIUS_M, inside=True)
    return Surface(shape, Texture(pattern, horizon, zenith), casts=False, lit=False, depth=pattern != "sky")


def _sample_floor(rng: np.random.Generator) -> tuple[Surface, str]:
    patterns: tuple[tuple[Pattern, float, str], ...] = (
        ("checkered", 0.7, "a checkered floor"),
        ("tiled", 0.6, "a tiled floor"),
        ("speckled", 0.5, "a speckled floor"),
        ("striped", 0.5, "a striped floor"),
    )
    pattern, cell_m, name = patterns[rng.integers(len(patterns))]
    palette = PALETTES[rng.integers(len(PALETTES))]
    offset = (float(rng.uniform(0, 9)), 0.5, float(rng.uniform(0, 9)))
    return Surface(Level(), Texture(pattern, *palette, cell_m, offset), casts=False), name


def _scaled(vector: Vector, factor: float) -> Vector:
    return vector[0] * factor, vector[1] * factor, vector[2] * factor


def _mixed(a: Vector, b: Vector, share: float) -> Vector:
    x, y, z = (p + (q - p) * share for p, q in zip(a, b, strict=True))
    return x, y, z
