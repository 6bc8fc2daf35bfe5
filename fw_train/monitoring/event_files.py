"""TensorBoard's event files of a run: scalars, text, pictures, point clouds, hyperparameters."""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from fw_train.pictures.drawing import Picture
from fw_train.pictures.scene import Cloud

WAITING = 1_000  # events; the writer's own thread is only ahead of ours when a disk is slow
POINT_SIZE = 0.016
RETRY_S = 60.0


class EventFiles:
    """One event file at a time; after an error another one is begun, but not before RETRY_S have passed."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder = folder
        self._writer: SummaryWriter | None = self._open(first_step + 1)
        self._failed_at = 0.0

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writing().add_scalar(tag, value, step)
        self._flush()

    def text(self, step: int, tag: str, text: str) -> None:
        """Plain text, line by line as it is."""
        self._writing().add_text(tag, "\n".join("    " + line for line in text.splitlines()), step)
        self._flush()

    def picture(self, step: int, tag: str, picture: Picture) -> None:
        self._writing().add_image(tag, picture, step, dataformats="HWC")
        self._flush()

    def cloud(self, step: int, tag: str, cloud: Cloud) -> None:
        camera = {"cls": "PerspectiveCamera", "fov": 45}
        material = {"cls": "PointsMaterial", "size": POINT_SIZE}
        self._writing().add_mesh(
            tag,
            cloud.vertices[None],
            colors=np.ascontiguousarray(cloud.colours[None]),
            config_dict={"camera": camera, "material": material},
            global_step=step,
        )
        self._flush()

    def hparams(self, values: Mapping[str, int | float | str | bool], judged_by: tuple[str, ...]) -> None:
        """What the run is, for comparing it with others by the scalars `judged_by`, which are written elsewhere."""
        shown = {name: str(value).lower() if isinstance(value, bool) else value for name, value in values.items()}
        writer = self._writing()._get_file_writer()
        for summary in hparams_summaries(shown, dict.fromkeys(judged_by, 0.0))[:2]:  # the third one ends a run
            writer.add_summary(summary)
        self._flush()

    def charts(self, titles: Mapping[str, tuple[str, ...]]) -> None:
        """Charts of several curves each: group/title to patterns of tags."""
        layout: dict[str, dict[str, list[object]]] = {}
        for title, patterns in titles.items():
            group, name = title.split("/")
            layout.setdefault(group, {})[name] = ["Multiline", [f"^{re.escape(p)}" for p in patterns]]
        self._writing().add_custom_scalars(layout)
        self._flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _writing(self) -> SummaryWriter:
        if self._writer is None:
            if time.monotonic() < self._failed_at + RETRY_S:
                raise OSError(f"no event file can be written in {self.folder} at the moment")
            self._writer = self._open(None)
        return self._writer

    def _open(self, purge_step: int | None) -> SummaryWriter:
        return SummaryWriter(str(self.folder), purge_step=purge_step, max_queue=WAITING)

    def _flush(self) -> None:
        writer = self._writing()
        try:
            writer.flush()
        except Exception:  # of the writer's own thread, which it has ended
            self._writer, self._failed_at = None, time.monotonic()
            with suppress(Exception):
                writer.close()
            raise
