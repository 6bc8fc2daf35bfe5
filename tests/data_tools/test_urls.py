"""URLs in the place of a dataset: `webdataset` would run a command or ask a server; here they are no folders."""

from pathlib import Path

import pytest
from data_commands import command
from packed_clips import make_packed

from data_tools import pack, verify
from fw_train.data.loader import LoaderParams, SourceParams, TrainingData


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return make_packed(tmp_path_factory.mktemp("urls"), clips=((1, 32, 48, 5),), kinds=())


def open_loader(url, packed):
    params = LoaderParams(5, ((32, 48),), "online", (), workers=0)
    TrainingData([SourceParams(url)], params, seed=0)


READERS = {
    "loader": open_loader,
    "pack-from": lambda url, packed: command(pack, url, "new", "--workers", 1),
    "pack-to": lambda url, packed: command(pack, packed.with_name("raw"), url, "--workers", 1),
    "verify": lambda url, packed: command(verify, url, "--workers", 1),
}


@pytest.mark.parametrize(
    "url", ["pipe:touch {marker}", "file:{packed}", "http://localhost/{packed}", "s3://bucket/data"]
)
@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_a_url_is_refused_and_nothing_is_run_or_made(tmp_path, monkeypatch, packed, read, url):
    monkeypatch.chdir(tmp_path)
    url = url.format(marker=tmp_path / "marker", packed=packed)
    with pytest.raises(ValueError, match="is a URL, not a folder; mount what it refers to") as refused:
        read(url, packed)
    assert str(refused.value).startswith(str(Path(url)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_may_have_a_colon(tmp_path, monkeypatch, packed):
    monkeypatch.chdir(tmp_path)
    assert command(pack, packed.with_name("raw"), "run:1", "--workers", 1) == 0
    assert command(verify, "run:1", "--workers", 1) == 0
