import threading
import time

from fw_train.monitoring import background
from fw_train.monitoring.background import Background


def test_work_is_done_in_order_before_close_returns():
    done = []
    work = Background("test")
    for number in range(100):
        work.submit(lambda n=number: done.append(n))
    work.close(60)
    assert done == list(range(100))


def test_an_error_is_told_once_and_the_next_piece_is_tried(caplog):
    done = []

    def fail():
        raise OSError(28, "No space left on device")

    work = Background("test")
    for _ in range(5):
        work.submit(fail)
    work.submit(lambda: done.append(True))
    work.close(60)
    assert done == [True]
    assert caplog.text.count("No space left on device") == 1
    assert "test: 5 writes failed, 0 were given up" in caplog.text


def test_a_file_system_that_hangs_holds_up_neither_submit_nor_close(monkeypatch, caplog):
    monkeypatch.setattr(background, "WAITING", 3)
    work, hang, began = Background("test"), threading.Event(), time.monotonic()
    for _ in range(10):
        work.submit(hang.wait)
    work.close(0.05)
    assert time.monotonic() - began < 10
    assert work.lost >= 6
    assert "3 writes are waiting already" in caplog.text
    hang.set()
