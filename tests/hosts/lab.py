"""Several hosts on one machine: a network namespace each, joined by a bridge; started, cut off, slowed, filled, killed.

A host has its own address, hostname, /etc/hosts, /tmp and /dev/shm; all else is the machine's, so every host can run
the same Python. A folder below `Lab.shared` is the same on all hosts (as NFS would be), one below /tmp is not.

Needs root, iproute2 and iptables. Three traps: a living host is entered with `nsenter`, since another `unshare` would
make new mounts; all of /tmp is bound, not /tmp/ray alone, or no folder would be unshared; namespace names and bridges
are global, hence a prefix of its own for each lab.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]
NEEDED = ("ip", "tc", "iptables", "nsenter", "unshare")
PORT = 26379
"""Of the head's control service; each host has all ports for itself."""
START_SECONDS = 150.0


def missing() -> str:
    """Why there can be no hosts here; empty where there can."""
    absent = [name for name in NEEDED if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None]
    if absent:
        return f"hosts need {', '.join(absent)} (Debian packages iproute2, iptables, util-linux)"
    return "" if os.geteuid() == 0 else "hosts need root, which makes network namespaces"


def _run(*words: str, check: bool = True) -> str:
    environment = os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@dataclass(slots=True)
class Host:
    """One host of a lab; its methods are what can happen to it.

    Example: ``host = lab.host("b"); host.start_ray(cpus=2); host.cut(); host.mend(); host.kill()``
    """

    lab: "Lab"
    name: str
    address: str
    folder: Path
    """Holds what is the host's own: ``tmp`` (its /tmp) and ``log``."""
    namespace: str
    outside: str
    """The bridge's end of its cable."""
    holder: "subprocess.Popen[bytes]"
    """Keeps the namespaces alive and is no part of what dies with the host."""
    started: "list[subprocess.Popen[bytes]]" = field(default_factory=list)

    def popen(
        self, *words: str, environment: Mapping[str, str] | None = None, log: str | None = None
    ) -> "subprocess.Popen[bytes]":
        """Start a command on the host, its output in ``folder/log/NAME``."""
        enter = ["nsenter", "-t", str(self.holder.pid), "-m", "-u", "-n", "--wd=" + str(ROOT), "--"]
        log_file = (self.folder / "log" / (log or f"{len(self.started)}.log")).open("ab")
        process = subprocess.Popen(
            [*enter, *words],
            env=self.lab.environment | dict(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        log_file.close()
        self.started.append(process)
        return process

    def run(self, *words: str, timeout: float = 60.0, environment: Mapping[str, str] | None = None) -> str:
        """Run a command on the host to its end; its output.

        Raises:
            RuntimeError: it fails.
        """
        log = f"run-{len(self.started)}.log"
        process = self.popen(*words, environment=environment, log=log)
        code = process.wait(timeout)
        said = (self.folder / "log" / log).read_text(errors="replace")
        if code:
            raise RuntimeError(f"{self.name}: {' '.join(words)} ends with {code}: {said[-2000:]}")
        return said

    def start_ray(
        self,
        *,
        cpus: float,
        labels: Mapping[str, str] | None = None,
        store_mb: int = 200,
        memory_gb: float = 4.0,
    ) -> None:
        """Make it a node of the lab's Ray cluster, its head if it is the first host; returns once it has joined."""
        place = [f"--address={self.lab.ray_address}"]
        if self is self.lab.hosts[0]:
            place = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        named = ",".join(f"{name}={value}" for name, value in (labels or {}).items())
        options = [f"--labels={named}"] if named else []
        words = (
            str(Path(sys.executable).with_name("ray")), "start", *place, "--block",
            f"--node-ip-address={self.address}", f"--num-cpus={cpus:g}", f"--object-store-memory={store_mb * 2**20}",
            f"--memory={int(memory_gb * 2**30)}", *options,
        )  # fmt: skip
        process = self.popen(*words, log="ray.log")
        deadline = time.monotonic() + START_SECONDS
        while self.address not in self.lab.nodes():
            if time.monotonic() > deadline:
                said = (self.folder / "log" / "ray.log").read_text(errors="replace")
                raise RuntimeError(f"{self.name} did not join Ray within {START_SECONDS:.0f} s: {said[-2000:]}")
            if process.poll() is not None:  # a raylet that does not answer within 30 s ends: the machine is busy
                process = self.popen(*words, log="ray.log")
            time.sleep(0.5)

    @property
    def in_ray(self) -> bool:
        """Whether a raylet runs on it."""
        return any("raylet" in _command(pid) for pid in self.pids())

    def pids(self) -> list[int]:
        """Every process on the host."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self.namespace).split() if int(pid) != self.holder.pid]

    def processes(self, title: str) -> list[int]:
        """Processes whose title begins so (`ray::RolloutActor`), in the order they were started."""
        return sorted(pid for pid in self.pids() if _command(pid).startswith(title))

    def signal(self, number: signal.Signals, *pids: int) -> None:
        """Send a signal to some of its processes."""
        for pid in pids:
            _signal(pid, number)

    def kill(self) -> None:
        """The host dies: all its processes at once, without notice. Its disk and its cable stay."""
        for pid in self.pids():
            _signal(pid, signal.SIGKILL)
        for process in self.started:
            process.wait(10)
        shutil.rmtree(self.folder / "tmp" / "ray", ignore_errors=True)

    def cut(self) -> None:
        """Pull the cable."""
        _run("ip", "link", "set", self.outside, "down")

    def mend(self) -> None:
        """Put the cable back, and take away every slowness and loss."""
        _run("ip", "link", "set", self.outside, "up")
        _run("tc", "qdisc", "del", "dev", self.outside, "root", check=False)
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "del", "dev", "eth0", "root", check=False)
        _run("ip", "netns", "exec", self.namespace, "iptables", "-F", "INPUT")

    def slow(self, mbit: float) -> None:
        """Let no more than so much through the cable, either way. [Mbit/s]"""
        limit = ("tbf", "rate", f"{mbit:g}mbit", "burst", "64kb", "latency", "400ms")
        _run("tc", "qdisc", "replace", "dev", self.outside, "root", *limit)
        _run("ip", "netns", "exec", self.namespace, "tc", "qdisc", "replace", "dev", "eth0", "root", *limit)

    def lose(self, share: float) -> None:
        """Drop so much of what arrives, at random."""
        rule = ("-m", "statistic", "--mode", "random", "--probability", f"{share:g}", "-j", "DROP")
        _run("ip", "netns", "exec", self.namespace, "iptables", "-A", "INPUT", "-i", "eth0", *rule)

    def mount(self, where: Path, *, size: str, read_only: bool = False) -> None:
        """Put a small disk of its own (tmpfs) at a folder, as seen from this host alone."""
        where.mkdir(parents=True, exist_ok=True)
        options = f"size={size}" + (",ro" if read_only else "")
        self.run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(where))

    def remount(self, where: Path, *, read_only: bool) -> None:
        """Make a disk that `mount` has put there read-only, or writable again."""
        self.run("mount", "-o", f"remount,{'ro' if read_only else 'rw'}", str(where))


@dataclass(slots=True)
class Lab:
    """Hosts joined by a bridge, and the Ray cluster they form; the first host is its head.

    Example: ``with Lab() as lab: head = lab.host("head"); head.start_ray(cpus=0)``
    """

    loopback_names: bool = False
    """Let each host's name resolve to 127.0.1.1, as Debian's installer leaves it."""
    hosts: list[Host] = field(default_factory=list)
    prefix: str = field(default_factory=lambda: f"r3{secrets.token_hex(2)}")
    subnet: str = field(default_factory=lambda: f"10.{200 + secrets.randbelow(50)}.{secrets.randbelow(250)}")
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="r3hf-lab-", dir="/var/tmp")))
    environment: dict[str, str] = field(default_factory=dict)
    """Of every command on every host; set when the lab is entered."""

    @property
    def shared(self) -> Path:
        """A folder that all hosts see."""
        return self.folder / "shared"

    @property
    def ray_address(self) -> str:
        """What `RAY_ADDRESS` is for this cluster."""
        return f"{self.hosts[0].address}:{PORT}"

    def __enter__(self) -> "Lab":
        self.shared.mkdir()
        token = self.folder / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        kept = ("PATH", "HOME", "LANG", "PYTHONPATH", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
        self.environment = {name: os.environ[name] for name in kept if name in os.environ} | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin",
            "PYTHONPATH": os.environ.get("PYTHONPATH", str(ROOT)),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
        }
        _run("ip", "link", "add", self.prefix, "type", "bridge")
        _run("ip", "addr", "add", f"{self.subnet}.254/24", "dev", self.prefix)
        _run("ip", "link", "set", self.prefix, "up")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self.hosts:
            host.kill()
            host.holder.kill()
            host.holder.wait()
            _run("ip", "netns", "del", host.namespace, check=False)
        _run("ip", "link", "del", self.prefix, check=False)
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def host(self, name: str, *, shm_mb: int = 1024) -> Host:
        """Add a host; Ray does not run on it yet."""
        number = len(self.hosts) + 1
        namespace, outside = f"{self.prefix}{name}", f"{self.prefix}v{number}"
        folder, address = self.folder / name, f"{self.subnet}.{number}"
        for part in ("tmp", "log"):
            (folder / part).mkdir(parents=True)
        (folder / "tmp").chmod(0o1777)
        _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", outside, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        _run("ip", "link", "set", outside, "master", self.prefix, "up")
        inside = ("ip", "-n", namespace)
        for words in (
            ("addr", "add", f"{address}/24", "dev", "eth0"),
            ("link", "set", "eth0", "up"),
            ("link", "set", "lo", "up"),
            ("route", "add", "default", "via", f"{self.subnet}.254"),
        ):
            _run(*inside, *words)
        names = [("127.0.0.1", "localhost"), ("127.0.1.1" if self.loopback_names else address, name)]
        (folder / "hosts").write_text("".join(f"{ip} {host}\n" for ip, host in names))
        ready = folder / "ready"
        script = (
            f"hostname {name} && mount -t tmpfs -o size={shm_mb}m tmpfs /dev/shm && mount --bind {folder}/tmp /tmp && "
            f"mount --bind {folder}/hosts /etc/hosts && touch {ready} && exec sleep infinity"
        )
        holder = subprocess.Popen(
            ["ip", "netns", "exec", namespace, "unshare", "-m", "-u", "--propagation", "private", "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
        )
        deadline = time.monotonic() + 10.0
        while not ready.exists():
            if holder.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"host {name} did not start")
            time.sleep(0.02)
        host = Host(self, name, address, folder, namespace, outside, holder)
        self.hosts.append(host)
        return host

    def nodes(self) -> dict[str, str]:
        """Address of each living node -> its id in Ray."""
        program = (
            "import sys; from ray._raylet import GcsClient\n"
            f"nodes = GcsClient(address={self.ray_address!r}).get_all_node_info(timeout=5)\n"
            "for i, n in nodes.items():\n"
            "    if n.state == 0: sys.stdout.write(f'{n.node_manager_address} {i.hex()}\\n')\n"
        )
        try:
            said = self.hosts[0].run(sys.executable, "-c", program)
        except RuntimeError:  # the head is not up yet
            return {}
        lines = [line.split() for line in said.splitlines() if line.startswith("10.")]
        return {address: node for address, node in lines}


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").split(" ")[0]
    except OSError:
        return ""


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
