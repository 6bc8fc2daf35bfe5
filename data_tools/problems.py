"""What is wrong with a dataset: one line each."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Problem(NamedTuple):
    """One thing that is wrong; key and member are empty where it concerns the file."""

    file: str
    key: str
    member: str
    what: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.key, self.member, self.what) if part)


@contextmanager
def problems_of(file: str, problems: list[Problem], key: str = "", member: str = "") -> Iterator[None]:
    """Notes what is raised within, and goes on behind it."""
    try:
        yield
    except (ValueError, OSError) as error:
        problems.append(Problem(file, key, member, str(error)))
