import pytest

from fw_train.atomic_files import ConcurrentWriter, new_file, write_file


def test_a_file_is_complete_or_absent(tmp_path):
    (tmp_path / ".x.bin.0123abcd.tmp").write_bytes(b"of a killed run")
    (tmp_path / ".y.bin.0123abcd.tmp").write_bytes(b"another's")

    def fail(file):
        file.write(b"half")
        raise RuntimeError

    with pytest.raises(RuntimeError), new_file(tmp_path / "x.bin") as file:
        fail(file)
    assert [p.name for p in tmp_path.rglob("*")] == [".y.bin.0123abcd.tmp"]
    with new_file(tmp_path / "x.bin") as file:
        file.write(b"whole")
        assert not (tmp_path / "x.bin").exists()
    assert (tmp_path / "x.bin").read_bytes() == b"whole"
    with pytest.raises(ConcurrentWriter, match="another process is writing"), new_file(tmp_path / "x.bin"):
        next(tmp_path.glob(".x.bin.*")).unlink()
    inode = (tmp_path / "x.bin").stat().st_ino
    write_file(tmp_path / "x.bin", b"whole")
    assert (tmp_path / "x.bin").stat().st_ino == inode
    write_file(tmp_path / "x.bin", b"other")
    assert (tmp_path / "x.bin").read_bytes() == b"other"
