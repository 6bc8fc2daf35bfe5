"""Runs a command so that nothing of it remains: neither when it ends, nor when this process or its parent is ended.

python -m launch.tether COMMAND...          ends with the command's code, 128 + N for signal N
"""

import os
import signal
import subprocess
import sys
from types import FrameType
from typing import NoReturn

from launch.descendants import adopt_orphans, die_with_parent, kill_descendants

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def main(command: list[str]) -> NoReturn:
    parent = os.getppid()
    adopt_orphans()
    for number in ENDING:
        signal.signal(number, _end)
    die_with_parent(signal.SIGTERM)
    if os.getppid() != parent:  # it ended before this process asked to be told
        os._exit(1)
    # Should this very process be killed, its parent adopts what is left and can end that.
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_parent)
    code = child.wait()
    kill_descendants()
    os._exit(code if code >= 0 else 128 - code)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    kill_descendants()
    os._exit(128 + number)


if __name__ == "__main__":
    main(sys.argv[1:])
