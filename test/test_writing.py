"""Files that are written whole or not at all, whatever goes wrong."""

import os

import pytest
import torch

from writing import write_text, written_whole


@pytest.fixture
def path(tmp_path):
    """A file with text in it."""
    (tmp_path / "file").write_text("old")
    return tmp_path / "file"


def test_an_error_of_other_code_passes_unchanged(path):
    error = RuntimeError("shape [2, 3] is invalid")
    with pytest.raises(RuntimeError) as failure, written_whole(path) as temporary:
        temporary.write_text("new")
        raise error
    assert failure.value is error
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("opened", [False, True])
def test_a_full_disk_is_an_os_error_whoever_reports_it(path, opened):
    resource = pytest.importorskip("resource")  # no file may grow beyond a limit
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="file: not written .*disk full"):
            with written_whole(path) as temporary:
                if opened:
                    with open(temporary, "wb") as file:
                        torch.save(torch.zeros(10_000), file)
                else:
                    torch.save(torch.zeros(10_000), temporary)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights, and there are no named pipes")
def test_a_link_leads_to_the_new_file_and_a_pipe_stays_one(path):
    link, pipe = path.with_name("link"), path.with_name("pipe")
    link.symlink_to(path)
    write_text(link, "new")
    assert link.is_symlink() and path.read_text() == "new"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "new")
    assert pipe.is_fifo() and os.read(reader, 9) == b"new"
    os.close(reader)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_device_that_takes_nothing_is_named():
    with pytest.raises(OSError, match=r"^/dev/full: not written \(.*No space"):
        write_text("/dev/full", "new")
