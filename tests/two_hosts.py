"""Two hosts on one machine, for training over several: each has a network, a host name, a process tree and a disk.

They are Linux namespaces below one user namespace, so no rights are needed where users may make such, joined by a veth
pair. Killing a host's first process ends all of its others at once, as a power failure does. What is not real:

* the ssh server is asyncssh, the first process of each host; the client is the machine's own ``ssh``, told by ``-F``
  which configuration to use (a two-line script before it on the path), so that nobody's ``~/.ssh`` is touched;
* ``pdsh`` is a script of a few lines which runs ``ssh`` for each host, with the options that DeepSpeed gives it.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

NAMES = ("host-a", "host-b")
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}

SSH_SERVER = """
import asyncio, contextlib, sys
import asyncssh

async def serve(process):
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        "/bin/sh", "-c", process.command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe
    )
    await asyncio.gather(copy(child.stdout, process.stdout), copy(child.stderr, process.stderr))
    process.exit(await child.wait())

async def copy(source, target):
    while data := await source.read(65536):
        with contextlib.suppress(OSError):  # the client is gone; the command is not
            target.write(data)

async def main(key, authorized):
    await asyncssh.listen(
        "", 22, server_host_keys=[key], authorized_client_keys=authorized, process_factory=serve, encoding=None
    )
    print("ready", flush=True)
    await asyncio.Event().wait()

asyncio.run(main(*sys.argv[1:]))
"""

SSH = """#!/bin/sh
exec {ssh} -F {config} "$@"
"""

SSH_CONFIG = """
IdentityFile {key}
IdentitiesOnly yes
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
User {user}
ServerAliveInterval 2
ServerAliveCountMax 3
"""

PDSH = """#!{python}
import subprocess, sys, threading

_, must_say, _, _, _, hosts, *command = sys.argv  # -S -f N -w HOSTS COMMAND...
assert must_say == "-S"
text = " ".join(command)
status = {{}}

def on(number, host):
    child = subprocess.Popen(
        ["ssh", host, text.replace("%n", str(number))], stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for line in child.stdout:
        print(f"{{host}}: {{line}}", end="", flush=True)
    status[host] = child.wait()

threads = [threading.Thread(target=on, args=pair) for pair in enumerate(hosts.split(","))]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(max(abs(s) for s in status.values()))
"""

# $1: folder of the host, $2: its place on its own disk, $3: hosts file, $4: name; then the server.
BEGIN = """
hostname "$4"
mount --bind "$1" "$2"
mount --bind "$3" /etc/hosts
ip link set lo up
shift 4
exec "$@"
"""


def reason_why_not() -> str:
    """Return why there can be no such hosts here; "" if there can."""
    if absent := [name for name in ("unshare", "nsenter", "ip", "ssh", "ssh-keygen") if shutil.which(name) is None]:
        return f"not installed: {', '.join(absent)}"
    try:
        import asyncssh  # noqa: F401
    except ImportError:
        return "asyncssh, the ssh server, is not installed"
    script = "mount --bind /tmp /mnt && ip link add one type veth peer name two"
    tried = subprocess.run([*NEW_HOST, "sh", "-ec", script], capture_output=True, text=True, timeout=60)
    return f"namespaces are not allowed: {tried.stderr.strip()}" if tried.returncode else ""


OWN = ["--net", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]  # mount namespace is implied
NEW_HOST = ["unshare", "--user", "--map-root-user", *OWN]


@dataclass
class Host:
    """One of the hosts."""

    name: str
    disk: Path
    """Where the test sees what the host has at `own`."""
    own: Path
    """Folder of the host's own disk, the same path on both."""
    process: subprocess.Popen[str]
    """``unshare``; the host's first process is its child."""
    path: str
    network: int
    """Open file of its network, which keeps the cable in the other host when this one has died."""

    @property
    def first(self) -> int:
        (child,) = psutil.Process(self.process.pid).children()
        return int(child.pid)

    def enter(self, *command: str) -> list[str]:
        """Return the command that runs `command` on the host."""
        namespaces = ["--user", "--net", "--uts", "--ipc", "--pid", "--mount"]
        return ["nsenter", "--preserve-credentials", "--target", str(self.first), *namespaces, "--", *command]

    def run(self, *command: str) -> str:
        done = subprocess.run(self.enter(*command), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(
        self, command: Sequence[str], log: Path, variables: dict[str, str], folder: Path
    ) -> subprocess.Popen[str]:
        """Start a command in a folder on the host; what it says goes to `log`."""
        script = f"cd {shlex.quote(str(folder))} && exec {shlex.join(command)}"
        with log.open("w") as file:
            return subprocess.Popen(
                self.enter("sh", "-c", script), env={**variables, "PATH": self.path}, stdout=file,
                stderr=subprocess.STDOUT, text=True,
            )  # fmt: skip

    def processes(self) -> list[str]:
        """Return the commands that run on the host beside its ssh server."""
        space = os.readlink(f"/proc/{self.first}/ns/pid")
        found = []
        for process in psutil.process_iter():
            try:
                there = os.readlink(f"/proc/{process.pid}/ns/pid") == space
                if there and process.pid != self.first and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except (OSError, psutil.Error):  # it has ended
                continue
        return found

    def kill(self) -> None:
        """End everything that runs on the host, at once."""
        self.process.kill()  # its child, the first process, goes with it, and the kernel ends the others
        self.process.communicate()


@contextmanager
def two_hosts(folder: Path) -> Iterator[dict[str, Host]]:
    """Give the two hosts, by name, for the length of a ``with`` block. They share the machine's disk but for `own`."""
    programs, own = folder / "programs", folder / "own"
    for made in (programs, own):
        made.mkdir()
    for key in ("server", "client"):
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(folder / key)], check=True, timeout=60
        )
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[name]} {name}\n" for name in NAMES))
    (folder / "ssh_config").write_text(SSH_CONFIG.format(key=folder / "client", user="nobody"))
    for name, text in (
        ("ssh", SSH.format(ssh=shutil.which("ssh"), config=folder / "ssh_config")),
        ("pdsh", PDSH.format(python=sys.executable)),
    ):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    path = os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]])
    hosts: dict[str, Host] = {}
    try:
        for name in NAMES:
            disk = folder / f"disk-of-{name}"
            disk.mkdir()
            begin = NEW_HOST
            if hosts:  # below the same user namespace, so that one link can join them
                target = str(next(iter(hosts.values())).first)
                begin = ["nsenter", "--preserve-credentials", "--user", "--target", target, "unshare", *OWN]
            server = [sys.executable, "-c", SSH_SERVER, str(folder / "server"), str(folder / "client.pub")]
            process = subprocess.Popen(
                [*begin, "sh", "-ec", BEGIN, "sh", str(disk), str(own), str(folder / "hosts"), name, *server],
                env={**os.environ, "PATH": path}, stdout=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                process.kill()
                raise AssertionError(f"{name} has not begun")
            (first,) = psutil.Process(process.pid).children()
            network = os.open(f"/proc/{first.pid}/ns/net", os.O_RDONLY)
            hosts[name] = Host(name, disk, own, process, path, network)
        one, two = hosts.values()
        link = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(two.first)]
        # The other host's process id means something outside alone: enter the network, not the process tree.
        target = ["nsenter", "--preserve-credentials", "--target", str(one.first), "--user", "--net"]
        subprocess.run([*target, *link], check=True, timeout=60)
        for host in (one, two):
            host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        _await_link(one, ADDRESSES[two.name])
        yield hosts
    finally:
        for host in hosts.values():
            if host.process.poll() is None:
                host.kill()
            os.close(host.network)


def _await_link(host: Host, address: str) -> None:
    probe = f"import socket; socket.create_connection(({address!r}, 22), timeout=5).close()"
    deadline = time.monotonic() + 30
    while subprocess.run(host.enter(sys.executable, "-c", probe), capture_output=True, timeout=60).returncode:
        assert time.monotonic() < deadline, f"{host.name} does not reach {address}"
        time.sleep(0.2)
