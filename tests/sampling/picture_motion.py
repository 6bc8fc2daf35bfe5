"""How the contents of a clip move, fitted to all pixels at once by least squares (the optical-flow constraint)."""

from typing import NamedTuple

import numpy as np

BLUR = 4  # pixels that become one: gradients must see further than things move


class PictureMotion(NamedTuple):
    """Means over the clip, in pixels a frame: contents move `right` and `down`; `zoom` is how much the right edge moves out
    and `shear` how much the lower edge moves right, beside what all does."""

    right: float
    down: float
    zoom: float
    shear: float


def picture_motion(frames):
    """Of frames [T, H, W, 3]."""
    grey = frames.astype(np.float64).mean(axis=-1)
    count, height, width = grey.shape
    height, width = height // BLUR * BLUR, width // BLUR * BLUR
    small = grey[:, :height, :width].reshape(count, height // BLUR, BLUR, width // BLUR, BLUR).mean(axis=(2, 4))
    middle = (small[1:] + small[:-1]) / 2
    over_time, across, along = small[1:] - small[:-1], np.gradient(middle, axis=1), np.gradient(middle, axis=2)
    y, x = np.meshgrid(*(np.linspace(-1, 1, side) for side in small.shape[1:]), indexing="ij")
    aspect = small.shape[1] / small.shape[2]
    columns = along, across, along * x + across * y * aspect, along * y
    found = [
        np.linalg.lstsq(np.stack([c[t].ravel() for c in columns], axis=1), -over_time[t].ravel(), rcond=None)[0]
        for t in range(count - 1)
    ]
    return PictureMotion(*(float(value) * BLUR for value in np.mean(found, axis=0)))
