"""A command on all hosts at once over ssh, without a question to anybody; answers in the order of the hosts."""

import re
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

CONNECT_S = 10
# A host that says nothing for 9 s counts as lost: with what follows, everything has ended within 15 s.
ALIVE = ("ServerAliveInterval=3", "ServerAliveCountMax=3")


class Answer(NamedTuple):
    host: str
    code: int  # the command's; 255: ssh itself failed
    output: str  # both streams


def ssh_options(port: int | None, connect_s: int = CONNECT_S) -> list[str]:
    options = ["BatchMode=yes", f"ConnectTimeout={connect_s}", *ALIVE]
    return [word for option in options for word in ("-o", option)] + (["-p", str(port)] if port else [])


def run_on_all(
    hosts: Sequence[str], command: str, port: int | None = None, *, connect_s: int = CONNECT_S, timeout_s: float = 30.0
) -> list[Answer]:
    """`command` is read by a shell on each host; hosts are names that `read_hostfile` let through."""

    def one(host: str) -> Answer:
        line = ["ssh", *ssh_options(port, connect_s), "-T", "--", host, command]
        try:
            # In a session of its own: Ctrl-C is for the launcher alone.
            done = subprocess.run(
                line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=timeout_s,
                start_new_session=True,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return Answer(host, 255, f"no answer within {timeout_s:g} s")
        return Answer(host, done.returncode, done.stdout.decode(errors="replace").strip())

    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return list(pool.map(one, hosts))


REMEDIES = (
    (
        "Permission denied",
        "the key is not accepted there: `ssh-copy-id {host}`, or name the right IdentityFile in ~/.ssh/config",
    ),
    (
        "Host key verification failed",
        "the host's own key is unknown here or has changed: see `ssh {host}`, or `ssh-keyscan {host} >> ~/.ssh/known_hosts`",
    ),
    ("Could not resolve hostname", "the name is unknown here: correct the hostfile or /etc/hosts"),
    ("Connection refused", "no sshd listens on that port: start it, or give --ssh-port"),
    (
        "timed out|no answer|No route|unreachable",
        "the host is off or out of reach: try `ping {host}`, and leave it out of the hostfile until it answers",
    ),
)


def explain(answer: Answer) -> str:
    """Why ssh could not reach a host, and what to try."""
    said = answer.output.splitlines()[-1] if answer.output else "ssh said nothing"
    for pattern, remedy in REMEDIES:
        if re.search(pattern, answer.output):
            return f"{answer.host}: {said}; {remedy.format(host=answer.host)}"
    return f"{answer.host}: {said}; try `ssh {answer.host} true`"
