"""The Dockerfile built and run without an engine: buildah as root, on a Debian that stands in for the CUDA base.

    with storage(tmp_path / "store") as store:
        store.make_base("docker.io/nvidia/cuda:...")
        store.build(context, "fw-train", volumes={"/somewhere": "/inside"})
        container = store.start("fw-train")
        container.run("id", "-u")

The stand-in has the package names that Debian and Ubuntu share, the start of services forbidden, and a user with number 1000, as
Ubuntu's images have. What it cannot show: NVIDIA's base, and CUDA.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

NEEDED = ("buildah", "debootstrap")
ENVIRONMENT = {"BUILDAH_ISOLATION": "chroot"}  # all that a machine without an engine allows
CERTIFICATES = "/etc/host-certificates.crt"  # of this machine, for pip inside


class Container(NamedTuple):
    store: "Store"
    name: str
    volumes: tuple[str, ...]

    def command(self, *command, hostname="container"):
        """The command line that runs a command in the container as the image's user; to be started on any host of a rig."""
        mounts = [word for volume in self.volumes for word in ("--volume", volume)]
        return ["env", *(f"{name}={value}" for name, value in ENVIRONMENT.items()),
                *self.store.buildah, "run", "--hostname", hostname, *mounts, self.name, "--", *map(str, command)]  # fmt: skip

    def run(self, *command, check=True, timeout=120):
        done = subprocess.run(self.command(*command), capture_output=True, text=True, timeout=timeout, check=False)
        if check and done.returncode:
            raise AssertionError(f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done


class Store(NamedTuple):
    folder: Path

    @property
    def buildah(self):
        return ["buildah", "--root", f"{self.folder}/images", "--runroot", f"{self.folder}/run"]

    def do(self, *words, timeout=600):
        """A buildah command; what it printed."""
        done = subprocess.run(
            [*self.buildah, *map(str, words)],
            env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError(f"buildah {words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def make_base(self, name):
        """A minimal Debian under the name of the image that the Dockerfile starts from."""
        base = self.do("from", "scratch").strip()
        root = Path(self.do("mount", base).strip())
        subprocess.run(["debootstrap", "--variant=minbase", "bookworm", str(root)], check=True, capture_output=True)
        policy = root / "usr/sbin/policy-rc.d"
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
        subprocess.run(["chroot", str(root), "useradd", "--uid", "1000", "--create-home", "ubuntu"], check=True)
        self.do("umount", base)
        self.do("commit", *self._policy(), "--quiet", "--rm", "--format", "docker", base, name)

    def make_base_with(self, base, name, variable):
        """The same with an environment variable, which its builds and containers inherit."""
        container = self.do("from", *self._policy(), "--pull-never", base).strip()
        self.do("config", "--env", variable, container)
        self.do("commit", *self._policy(), "--quiet", "--rm", "--format", "docker", container, name)

    def build(self, context, name, arguments=(), volumes=()):
        """The image from `context`'s Dockerfile, as one layer; what the build printed."""
        words = [word for argument in arguments for word in ("--build-arg", argument)]
        words += [word for volume in volumes for word in ("--volume", volume)]
        return self.do(
            "bud", *self._policy(), "--format", "docker", "--pull-never", "--network", "host", "--layers=false",
            *words, "--tag", name, context, timeout=900,
        )  # fmt: skip

    def start(self, image, volumes=()):
        """A container of the image; nothing runs in it yet."""
        return Container(self, self.do("from", *self._policy(), "--pull-never", image).strip(), tuple(volumes))

    def config(self, image):
        """What the image says of itself: user, entry point, health check."""
        return json.loads(self.do("inspect", "--type", "image", image))["Docker"]["config"]

    def root_of(self, container):
        """The container's file system, from outside."""
        return Path(self.do("mount", container.name).strip())

    def _policy(self):
        return ["--signature-policy", self.folder / "policy.json"]


@contextmanager
def storage(folder):
    """Images and containers in a folder of their own, removed at the end."""
    folder.mkdir(parents=True)
    (folder / "policy.json").write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    store = Store(folder)
    try:
        yield store
    finally:
        store.do("umount", "--all")
        store.do("rm", "--all")
        shutil.rmtree(folder)


def missing_programs():
    """What this machine lacks; tests skip themselves with it."""
    lacking = [name for name in NEEDED if shutil.which(name) is None]
    if os.geteuid() != 0:
        lacking.append("root")
    return lacking


def pip_access(folder):
    """Volumes that let pip inside install from where pip here does: its settings, certificates and local folders of wheels."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    wanted, local = {}, set()
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        option, value = name.rpartition(".")[2], value.strip("'\"")
        if option in ("index-url", "extra-index-url", "find-links"):
            wanted[option] = value
            # A local index points to files beside its folder.
            local |= {str(Path(word.removeprefix("file://")).parent) for word in value.split() if "//" in word}
            local |= {word for word in value.split() if "//" not in word}
        elif option == "cert":
            wanted["cert"] = CERTIFICATES
            local.add(value)
    settings = folder / "pip.conf"
    # Bytecode would only cost time here.
    lines = ["[global]", *(f"{option} = {value}" for option, value in wanted.items()), "[install]", "no-compile = true"]
    settings.write_text("\n".join(lines) + "\n")
    volumes = [f"{settings}:/etc/pip.conf:ro"]
    for path in sorted(filter(os.path.exists, local)):
        volumes.append(f"{path}:{CERTIFICATES if os.path.isfile(path) else path}:ro")
    return volumes
