"""Do depth, points and cameras of a clip agree, and if not, which single mistake explains it?

Depth is unprojected with the camera and compared with the points, as given and under every hypothesis about what went
wrong: matrices of the other direction, intrinsics in pixels, points in the world, and so on. A hypothesis is believed
where it makes the error four times smaller; what a clip cannot tell apart (inverted poses of a camera that stands still
are the given ones) is never a fault.

Axes: N frames, the clip's first one foremost, P pixels of each.
"""

from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from fw_train.batch import DepthKind
from fw_train.geometry import RE10K_SIZE, invert_rigid, relative_to_first, rigid

NEGLIGIBLE = 1.5e-3  # relative error; the label codec's bounds together are 1.2e-3
BETTER = 4.0  # times smaller, for a change to be believed
ALIKE = 1.5  # errors within this factor are the same: the change that is listed first is named
FEWEST = 16  # valid pixels, for a frame to count
ROUNDS, SHARP = 8, 1e-3  # of reweighting in robust fits; residuals below SHARP all weigh the same
OPENGL = (1.0, -1.0, -1.0)  # takes axes x right, y up, z backwards to ours
IMPOSSIBLE = float("inf")


class Labels(NamedTuple):
    """Pixels of some frames, as a clip has them or as a hypothesis changes them; float64."""

    depth: Tensor  # [N, P], as stored
    points: Tensor  # [N, P, 3]
    valid: Tensor  # [N, P], bool
    place: Tensor  # [P, 2], fractions of width and height
    cam_from_world: Tensor  # [N, 4, 4]
    intrinsics_frac: Tensor  # [N, 4]
    kind: DepthKind
    size: tuple[int, int]  # height, width


class Changed(NamedTuple):
    labels: Labels
    what: str  # is wrong, as a sentence's end


class Change(NamedTuple):
    """A hypothesis: the fault it names, and what undoes the fault."""

    part: str  # two changes of one part exclude each other
    fault: str
    cost: int  # how many mistakes it takes
    undo: Callable[[Labels], Changed]


class Match(NamedTuple):
    """How well labels agree."""

    error: float  # median relative error of the worst frame
    frame_errors: tuple[float, ...]  # of each frame


class Diagnosis(NamedTuple):
    given: Match
    changes: tuple[Change, ...]  # that explain the error; () where nothing does
    sentences: tuple[str, ...]  # about them
    repaired: Match  # after these
    best: Match  # the smallest error of all hypotheses
    alike: tuple[str, ...]  # sentences of other faults that the clip cannot tell from the named one


def diagnose(labels: Labels, tolerance: float) -> Diagnosis:
    """The fewest changes that explain the error of a clip; they explain it where they leave no more than `tolerance`."""
    given = match(labels)
    diagnosis = Diagnosis(given, (), (), given, given, ())
    for cost in (1, 2):
        current = diagnosis.repaired.error
        # Pairs of mistakes are many: they are tried where a clip is beyond use without them.
        if current <= (NEGLIGIBLE if cost == 1 else tolerance):
            break
        tried = [(changes, *attempt(labels, changes)) for changes in hypotheses(cost)]
        matches = [match(changed) for _, changed, _ in tried]
        best = min(matches, key=lambda found: found.error)
        if best.error < diagnosis.best.error:
            diagnosis = diagnosis._replace(best=best)
        if not best.error < min(current / BETTER, tolerance):
            continue
        near = [at for at, found in enumerate(matches) if found.error <= ALIKE * best.error]
        changes, _, sentences = tried[near[0]]
        diagnosis = Diagnosis(
            given,
            changes,
            tuple(sentences),
            matches[near[0]],
            best,
            tuple(" and ".join(tried[at][2]) for at in near[1:] if tried[at][0][0].fault != changes[0].fault),
        )
    return diagnosis


def hypotheses(cost: int) -> Iterator[tuple[Change, ...]]:
    """Changes that together are so many mistakes."""
    for change in CHANGES:
        if change.cost == cost:
            yield (change,)
    if cost == 2:
        for pair in combinations([change for change in CHANGES if change.cost == 1], 2):
            if pair[0].part != pair[1].part:
                yield pair


def attempt(labels: Labels, changes: tuple[Change, ...]) -> tuple[Labels, list[str]]:
    """Labels with the changes made one after another, and their sentences."""
    sentences = []
    for change in changes:
        labels, what = change.undo(labels)
        sentences.append(what)
    return labels, sentences


def match(labels: Labels) -> Match:
    """Unprojects depth, after scale and shift where its kind is affine, and compares it with the points.

    Frames with too few valid pixels say nothing: their error is 0.
    """
    off = relative_errors(labels)
    if not torch.isfinite(off[labels.valid]).all():
        return Match(IMPOSSIBLE, (IMPOSSIBLE,) * len(off))
    enough = labels.valid.sum(dim=1) >= FEWEST
    errors = [off[n][labels.valid[n]].median().item() if enough[n] else 0.0 for n in range(len(off))]
    return Match(max(errors), tuple(errors))


def relative_errors(labels: Labels) -> Tensor:
    """How far unprojected depth is from the points, in units of their distance to the first camera, [N, P]; NaN: no fit."""
    seen = camera_points(labels, relative_to_first(labels.cam_from_world))
    predicted = directions(labels) * metric_depth(labels, seen[..., 2])[..., None]
    # A turned and shifted distance is the same distance.
    return (predicted - seen).norm(dim=-1) / labels.points.norm(dim=-1).clamp_min(1e-12)


def directions(labels: Labels) -> Tensor:
    """Directions [N, P, 3] through the pixels, z = 1."""
    focal, centre = labels.intrinsics_frac[:, None, :2], labels.intrinsics_frac[:, None, 2:]
    across = (labels.place - centre) / focal
    return torch.cat((across, torch.ones_like(across[..., :1])), dim=-1)


def camera_points(labels: Labels, first_from_cam: Tensor) -> Tensor:
    """The points [N, P, 3] in their own frame's camera."""
    return (labels.points - first_from_cam[:, None, :3, 3]) @ first_from_cam[:, :3, :3]


def metric_depth(labels: Labels, z: Tensor) -> Tensor:
    """Depth [N, P] in the points' units, given the z [N, P] of the points in their cameras.

    Affine kinds get the scale and shift of the least relative error over the clip: of z, or of 1 / z for disparity.
    """
    if labels.kind == "metric":
        return labels.depth
    usable = labels.valid & (z > 0)
    if usable.sum() < FEWEST:
        return torch.full_like(z, torch.nan)
    label, target = labels.depth[usable], z[usable]
    factor = target if labels.kind == "affine_disparity" else 1 / target
    scale, shift = robust_fit(torch.stack((label * factor, factor), dim=-1), torch.ones_like(target))
    affine = scale * labels.depth + shift
    if scale <= 0:  # another kind of depth
        return torch.full_like(affine, torch.nan)
    return affine if labels.kind == "affine_depth" else torch.where(affine > 0, 1 / affine, 0)


def robust_fit(rows: Tensor, wanted: Tensor) -> Tensor:
    """The solution [K] of rows [M, K] x = wanted [M] with small absolute residuals, not squares: outliers count little."""
    size = rows.norm(dim=0).clamp_min(1e-300)  # columns of pixels and of fractions side by side
    rows, weight = rows / size, torch.ones_like(wanted)
    solution = rows.new_zeros(rows.shape[1])
    for _ in range(ROUNDS):
        weighted = rows.mT * weight
        solution = torch.linalg.pinv(weighted @ rows, hermitian=True) @ (weighted @ wanted)
        weight = 1 / (rows @ solution - wanted).abs().clamp_min(SHARP)
    return solution / size


def _poses(labels: Labels, cam_from_world: Tensor, what: str) -> Changed:
    return Changed(labels._replace(cam_from_world=cam_from_world), what)


def _inverted(labels: Labels) -> Changed:
    what = "the matrices are camera-to-world (c2w) where world-to-camera (w2c) is wanted"
    return _poses(labels, invert_rigid(labels.cam_from_world), what)


def _transposed(labels: Labels) -> Changed:
    rotation, translation = labels.cam_from_world[:, :3, :3].mT, labels.cam_from_world[:, :3, 3]
    return _poses(labels, rigid(rotation, translation), "the rotations are transposed, the translations are right")


def _centre(labels: Labels) -> Changed:
    rotation, centre = labels.cam_from_world[:, :3, :3], labels.cam_from_world[:, :3, 3:]
    what = "the last column is the camera's centre where the translation -R c is wanted"
    return _poses(labels, rigid(rotation, -(rotation @ centre).squeeze(-1)), what)


def _opengl_poses(labels: Labels) -> Changed:
    flip = _flip4(labels)
    what = "the cameras have OpenGL axes (y up, looking along -z) where y down and +z are wanted"
    return _poses(labels, flip[:, None] * labels.cam_from_world, what)


def _opengl_inverted(labels: Labels) -> Changed:
    flip = _flip4(labels)
    what = "the matrices are camera-to-world with OpenGL axes, as in NeRF's transforms.json"
    return _poses(labels, flip[:, None] * invert_rigid(labels.cam_from_world), what)


def _flip4(labels: Labels) -> Tensor:
    return labels.cam_from_world.new_tensor((*OPENGL, 1.0))


def _world_points(labels: Labels) -> Changed:
    pose = labels.cam_from_world[0]
    points = labels.points @ pose[:3, :3].mT + pose[:3, 3]
    return Changed(labels._replace(points=points), "the points are in the world's frame, not the first camera's")


def _own_points(labels: Labels) -> Changed:
    pose = relative_to_first(labels.cam_from_world)
    points = labels.points @ pose[:, :3, :3].mT + pose[:, None, :3, 3]
    return Changed(
        labels._replace(points=points), "each frame's points are in its own camera's frame, not the first one's"
    )


def _opengl_points(labels: Labels) -> Changed:
    what = "the points have OpenGL axes (y up, z backwards) where y down and z forwards are wanted"
    return Changed(labels._replace(points=labels.points * labels.points.new_tensor(OPENGL)), what)


def _intrinsics(scale: Callable[[int, int], tuple[float, ...]], what: str) -> Callable[[Labels], Changed]:
    """Undoes a convention by factors of fx, fy, cx, cy that follow from height and width."""

    def undo(labels: Labels) -> Changed:
        factors = labels.intrinsics_frac.new_tensor(scale(*labels.size))
        return Changed(labels._replace(intrinsics_frac=labels.intrinsics_frac * factors), what)

    return undo


def _original_aspect(height: int, width: int) -> tuple[float, ...]:
    original, shape = RE10K_SIZE[1] / RE10K_SIZE[0], width / height
    return (original / shape, 1, 1, 1) if original > shape else (1, shape / original, 1, 1)


def _swapped_focal(labels: Labels) -> Changed:
    return Changed(
        labels._replace(intrinsics_frac=labels.intrinsics_frac[:, (1, 0, 3, 2)]), "width and height are swapped"
    )


def _fitted_intrinsics(labels: Labels) -> Changed:
    """Intrinsics that the points in their cameras' frames ask for, whatever the depth."""
    seen = camera_points(labels, relative_to_first(labels.cam_from_world))
    usable = labels.valid & (seen[..., 2] > 0)
    fitted = labels.intrinsics_frac.clone()
    if usable.sum() < FEWEST:
        return Changed(labels, "")
    for axis in (0, 1):
        focal, centre = labels.intrinsics_frac[:, None, axis], labels.intrinsics_frac[:, None, 2 + axis]
        slope = (focal * seen[..., axis] / seen[..., 2])[usable]
        wanted = (labels.place[:, axis] - centre)[usable]
        factor, shift = robust_fit(torch.stack((slope, torch.ones_like(slope)), dim=-1), wanted)
        fitted[:, axis] *= factor
        fitted[:, 2 + axis] += shift
    if not (fitted[:, :2] > 0).all():
        return Changed(labels, "")
    before, after = (", ".join(f"{value:.4g}" for value in table[0]) for table in (labels.intrinsics_frac, fitted))
    return Changed(
        labels._replace(intrinsics_frac=fitted),
        f"fx, fy, cx, cy of the first frame are {before}; the points ask for {after}",
    )


def _ray_distance(labels: Labels) -> Changed:
    depth = labels.depth / directions(labels).norm(dim=-1)
    return Changed(labels._replace(depth=depth), "depth is the distance along the ray where z is wanted")


def _kind(kind: DepthKind) -> Callable[[Labels], Changed]:
    def undo(labels: Labels) -> Changed:
        return Changed(labels._replace(kind=kind), f"depth_kind is {labels.kind}, the values behave as {kind}")

    return undo


def _depth_scale(labels: Labels) -> Changed:
    if labels.kind != "metric":  # which any scale fits
        return Changed(labels, "")
    z = camera_points(labels, relative_to_first(labels.cam_from_world))[..., 2]
    factor = _ratio(z, labels.depth, labels.valid & (z > 0))
    what = f"depth is {1 / factor:.4g} times as large as points and translations have it"
    return Changed(labels._replace(depth=labels.depth * factor), what)


def _translation_scale(labels: Labels) -> Changed:
    factor = _translations_by(labels)
    pose = labels.cam_from_world
    what = f"translations are {1 / factor:.4g} times as large as depth and points have them"
    return Changed(labels._replace(cam_from_world=rigid(pose[:, :3, :3], factor * pose[:, :3, 3])), what)


def _points_scale(labels: Labels) -> Changed:
    if labels.kind != "metric":
        factor = 1 / _translations_by(labels)
    else:
        pose = relative_to_first(labels.cam_from_world)
        wanted = (directions(labels) * labels.depth[..., None]) @ pose[:, :3, :3].mT + pose[:, None, :3, 3]
        factor = _ratio(wanted.norm(dim=-1), labels.points.norm(dim=-1), labels.valid)
    what = f"points are {1 / factor:.4g} times as large as depth and translations have them"
    return Changed(labels._replace(points=labels.points * factor), what)


def _translations_by(labels: Labels) -> float:
    """The factor of the translations with which the points lie on the pixels' rays; 1 where it cannot be told."""
    pose = relative_to_first(labels.cam_from_world)
    rays = directions(labels) @ pose[:, :3, :3].mT
    rays = rays / rays.norm(dim=-1, keepdim=True)
    distance = labels.points.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    # p - b t along q: p x q = b (t x q)
    wanted = (torch.linalg.cross(labels.points, rays) / distance)[labels.valid].flatten()
    row = (torch.linalg.cross(pose[:, None, :3, 3].expand_as(rays), rays) / distance)[labels.valid].flatten()
    if not row.norm() > NEGLIGIBLE * len(row) ** 0.5:
        return 1.0
    factor = robust_fit(row[:, None], wanted).item()
    return factor if factor > 0 else 1.0


def _ratio(wanted: Tensor, found: Tensor, usable: Tensor) -> float:
    if usable.sum() < FEWEST:
        return 1.0
    return (wanted[usable] / found[usable].clamp_min(1e-12)).median().clamp_min(1e-12).item()


# In the order in which changes are made, and named where several explain a clip equally well.
CHANGES = (
    Change("poses", "pose-inverted", 1, _inverted),
    Change("poses", "rotation-transposed", 1, _transposed),
    Change("poses", "translation-is-centre", 1, _centre),
    Change("poses", "opengl-axes", 1, _opengl_poses),
    Change("poses", "pose-inverted", 2, _opengl_inverted),
    Change("points", "points-not-in-first-camera", 1, _world_points),
    Change("points", "points-not-in-first-camera", 1, _own_points),
    Change("points", "opengl-axes", 1, _opengl_points),
    Change(
        "intrinsics",
        "wrong-intrinsics",
        1,
        _intrinsics(lambda h, w: (1 / w, 1 / h, 1 / w, 1 / h), "they are in pixels where fractions are wanted"),
    ),
    Change(
        "intrinsics",
        "wrong-intrinsics",
        1,
        _intrinsics(lambda h, w: (w, h, w, h), "they were divided by width and height twice"),
    ),
    Change(
        "intrinsics",
        "wrong-intrinsics",
        1,
        _intrinsics(_original_aspect, "they refer to the uncropped 16:9 frames (RealEstate10K), not to these"),
    ),
    Change(
        "intrinsics", "wrong-intrinsics", 1, _intrinsics(lambda h, w: (1, w / h, 1, 1), "fy was divided by the width")
    ),
    Change(
        "intrinsics", "wrong-intrinsics", 1, _intrinsics(lambda h, w: (h / w, 1, 1, 1), "fx was divided by the height")
    ),
    Change("intrinsics", "wrong-intrinsics", 1, _swapped_focal),
    Change("intrinsics", "wrong-intrinsics", 1, _fitted_intrinsics),
    Change("depth", "wrong-depth-kind", 1, _ray_distance),
    Change("scale", "scale-mismatch", 1, _depth_scale),
    Change("scale", "scale-mismatch", 1, _translation_scale),
    Change("scale", "scale-mismatch", 1, _points_scale),
    Change("depth", "wrong-depth-kind", 1, _kind("affine_depth")),
    Change("depth", "wrong-depth-kind", 1, _kind("affine_disparity")),
    Change("depth", "wrong-depth-kind", 1, _kind("metric")),
)
