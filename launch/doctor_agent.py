"""The end of `fw doctor --hostfile` on a node: looks at the machine, then meets the others; all talk goes over the ssh connection.

    <- {"look": what to look at}                     -> FACTS {...}
    <- {"open": port}, to one node                   -> STORE port
    <- {"address", "port"}, to the others            -> JOINED what went wrong
    <- {"rank", "ranks"}, to those who came          -> NETWORK {...}

It ends when that connection does, and after LIMIT_S whatever happens.
"""

import json
import logging
import os
import queue
import signal
import sys
import threading
from datetime import timedelta
from typing import Any

from launch.doctor_facts import Asked, to_json
from launch.doctor_node import look_at_node

FACTS, STORE, JOINED, NETWORK = "fw-doctor-facts ", "fw-doctor-store ", "fw-doctor-joined ", "fw-doctor-network "
LIMIT_S = 130
STORE_S = 8


def main() -> None:
    signal.alarm(LIMIT_S)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("launch").setLevel(logging.DEBUG)  # of a node that does not answer, its last line is shown
    inbox: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(inbox,), daemon=True).start()
    asked, store = Asked(), None
    while True:
        message = json.loads(inbox.get())
        if "look" in message:
            asked = Asked(**message["look"])
            _say(FACTS + to_json(look_at_node(asked, None)))
        elif "open" in message:
            store = open_store(message["open"])
            _say(f"{STORE}{store.port}")
        elif "address" in message:
            store, trouble = reach_store(message["address"], message["port"])
            _say(JOINED + trouble)
        else:
            _say(NETWORK + to_json(_look(store, message["rank"], message["ranks"], asked.folder)))


def open_store(port: int) -> Any:
    """At the port where ranks of a run would meet, or at another where that one is taken, which has been told."""
    from torch.distributed import TCPStore

    timeout = timedelta(seconds=STORE_S)
    try:
        return TCPStore("0.0.0.0", port, None, True, timeout, wait_for_workers=False)
    except RuntimeError:
        return TCPStore("0.0.0.0", 0, None, True, timeout, wait_for_workers=False)


def reach_store(address: str, port: int) -> tuple[Any, str]:
    """The store that another node opened, or what went wrong."""
    from torch.distributed import TCPStore

    try:
        return TCPStore(address, port, None, False, timedelta(seconds=STORE_S), wait_for_workers=False), ""
    except RuntimeError as error:
        return None, str(error).splitlines()[0][:300]


def _look(store: Any, rank: int, ranks: int, folder: str) -> Any:
    import torch

    from launch.doctor_network import Meeting, look_at_network

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    return look_at_network(Meeting(store, rank, range(ranks), range(ranks)), folder, device)


def _listen(inbox: "queue.Queue[str]") -> None:
    for line in sys.stdin:
        inbox.put(line)
    os._exit(0)  # whoever asked has gone, or wants no more


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
