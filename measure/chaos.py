"""`make chaos`: a served MiniLM under load through the gateway, while its processes are killed and fuzz comes in.

Every answer is compared with the first one to its text. Reported: requests by what became of them, how long each kill
was felt, and what is held before and after: memory, descriptors, shared memory. Exit 1 when an answer was wrong, when a
part did not come back, or when fuzz ended a server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from builders.judging import corpus
from builders.spec import load_spec

USERS = 4
ROUNDS = 3
FUZZED = 200
_RECOVERY_S = 120.0
_BETWEEN_S = 3.0
_SAME = 0.98  # of two answers to one text: batches of other sizes differ a little
_METHOD = "/inference.GRPCInferenceService/ModelInfer"


@dataclass
class SteadyLoad:
    """Closed loops of embeddings, each user with a kept connection. `causes` counts what became of requests."""

    port: int
    causes: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[float]] = field(default_factory=dict)
    answered: float = 0.0  # when the last request that succeeded was sent
    _stopped: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def start(self, users: int) -> None:
        texts = corpus.texts(None, 32)
        self._threads = [threading.Thread(target=self._user, args=(texts[at::users],)) for at in range(users)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(_RECOVERY_S)

    def _user(self, texts: list[str]) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_RECOVERY_S)
        turn = 0
        while not self._stopped.is_set():
            text, turn, began = texts[turn % len(texts)], turn + 1, time.monotonic()
            try:
                body = json.dumps({"model": "minilm", "input": text})
                connection.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                cause = self._judged(text, answer.status, answer.read())
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                cause = f"connection: {type(error).__name__}"
            with self._lock:
                self.causes[cause] += 1
                if cause == "200":
                    self.answered = max(self.answered, began)
            if cause != "200":
                self._stopped.wait(0.05)
        connection.close()

    def _judged(self, text: str, status: int, body: bytes) -> str:
        if status != 200:
            return str(status)
        vector: list[float] = json.loads(body)["data"][0]["embedding"]
        known = self.first.setdefault(text, vector)
        return "200" if sum(a * b for a, b in zip(vector, known, strict=True)) >= _SAME else "wrong"


@dataclass(frozen=True)
class Held:
    """By the service as a whole; `descriptors` of the gateway."""

    rss_mb: float
    descriptors: int
    shared: int


class Service:
    """`trireme serve` and its children."""

    def __init__(self, spec: Path, build_dir: Path) -> None:
        ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "gateway", "gateway-grpc")]
        command = [
            sys.executable,
            "-m",
            "builders",
            "serve",
            str(spec),
            "--json",
            "--build-dir",
            str(build_dir),
            *ports,
        ]
        self._process = subprocess.Popen([*command, "--ready-timeout-s=600"], stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the service did not start; it has said why")
        facts = json.loads(line)
        self.port, self.grpc = int(facts["gateway"].split(":")[1]), facts["gateway_grpc"]

    def pid_of(self, part: str) -> int | None:
        """The youngest process of that program, or module."""
        import psutil

        found = []
        for one in psutil.Process(self._process.pid).children(recursive=True):
            try:
                program, *rest = one.cmdline() or [""]
                if part in (Path(program).name, *rest[:2]) and one.status() != psutil.STATUS_ZOMBIE:
                    found.append((one.create_time(), one.pid))
            except psutil.NoSuchProcess:
                continue
        return max(found)[1] if found else None

    def held(self) -> Held:
        import psutil

        own = psutil.Process(self._process.pid)
        memory = sum(one.memory_info().rss for one in (own, *own.children(recursive=True)) if one.is_running())
        gateway = self.pid_of("runtime.gateway")
        shared = len(list(Path("/dev/shm").glob(f"trireme_{self._process.pid}_*")))
        return Held(memory / 1e6, 0 if gateway is None else psutil.Process(gateway).num_fds(), shared)

    def close(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(120)
        assert self._process.stdout is not None
        self._process.stdout.close()
        return code


def _kill(service: Service, load: SteadyLoad, part: str) -> float | None:
    """Seconds until a request that was sent after the kill succeeded; None where none did, or there is no such part."""
    pid = service.pid_of(part)
    if pid is None:
        return None
    began = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    while time.monotonic() - began < _RECOVERY_S:
        # What a server still had in hand may be answered after its death is asked for; another process is not.
        if load.answered > began + 0.2 and service.pid_of(part) not in (None, pid):
            return time.monotonic() - began
        time.sleep(0.02)
    return None


def _fuzz(service: Service, count: int, chance: random.Random) -> Counter[str]:
    """What came back, by kind of request."""
    import grpc

    told: Counter[str] = Counter()
    makers: dict[str, Callable[[], bytes]] = {
        "junk": lambda: chance.randbytes(chance.randint(1, 2000)),
        "form": lambda: _post(b"application/x-www-form-urlencoded", b"a=" + b"x" * chance.randint(1, 5_000_000)),
        "deep": lambda: _post(b"application/json", b"[" * chance.randint(40, 200_000)),
        "cut": lambda: _post(b"application/json", b'{"model": "minilm", "input": "x"}')[: -chance.randint(1, 80)],
        "both lengths": lambda: (
            b"POST /v1/embeddings HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
        ),
        "json": lambda: _post(b"application/json", json.dumps({"model": "minilm", "input": chance.random()}).encode()),
    }
    with grpc.insecure_channel(service.grpc, [("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary(_METHOD)
        for number in range(count):
            name = list(makers)[number % len(makers)]
            told[f"{name}: {_sent(service.port, makers[name]())}"] += 1
            try:
                ask(chance.randbytes(chance.randint(0, 3000)), timeout=30)
                told["grpc: OK"] += 1
            except grpc.RpcError as error:
                told[f"grpc: {error.code().name}"] += 1
    return told


def _post(kind: bytes, body: bytes) -> bytes:
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: x\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n"
    return head % (kind, len(body)) + body


def _sent(port: int, data: bytes) -> str:
    """The status, or how the connection ended. Nothing more is sent, so what is cut off gets an end at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            found = connection.recv(64)
        except OSError:
            return "closed"
    return found[9:12].decode(errors="replace") if found.startswith(b"HTTP/1.1 ") else "closed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="kills of each part")
    parser.add_argument("--users", type=int, default=USERS)
    parser.add_argument("--fuzzed", type=int, default=FUZZED, help="requests over HTTP, and as many over gRPC")
    arguments = parser.parse_args()
    sys.exit(_run(arguments))


def _run(arguments: argparse.Namespace) -> int:
    arguments.build_dir.mkdir(parents=True, exist_ok=True)
    service = Service(_spec(arguments.build_dir), arguments.build_dir)
    load = SteadyLoad(service.port)
    faults = []
    try:
        load.start(arguments.users)
        time.sleep(_BETWEEN_S)
        before = service.held()
        parts = {"stub": "triton_python_backend_stub", "Triton": "tritonserver", "gateway": "runtime.gateway"}
        for name, part in parts.items():
            found = []
            for _ in range(arguments.rounds):
                found.append(_kill(service, load, part))
                time.sleep(_BETWEEN_S)
            back = [one for one in found if one is not None]
            faults += [f"{name} did not come back"] * (len(found) - len(back))
            shown = f"median {median(back):.1f} s, max {max(back):.1f} s" if back else "never"
            print(f"{name:<8} killed {len(found)} times; answering again after: {shown}", flush=True)
        pids = {name: service.pid_of(part) for name, part in parts.items()}
        told = _fuzz(service, arguments.fuzzed, random.Random(7))
        print(f"fuzz     {json.dumps(dict(sorted(told.items())))}", flush=True)
        faults += [f"fuzz ended {name}" for name, part in parts.items() if service.pid_of(part) != pids[name]]
        faults += [f"fuzz was answered: {name}" for name in told if name.endswith((": 200", ": OK", ": 500"))]
        time.sleep(_BETWEEN_S)
        after = service.held()
    finally:
        load.stop()
        code = service.close()
    print(f"requests {json.dumps(dict(load.causes.most_common()))}")
    print(f"held     before {before}, after {after}")
    faults += [f"{load.causes['wrong']} answers were wrong"] if load.causes["wrong"] else []
    faults += [f"the service ended with {code}"] if code else []
    print("\n".join(f"FAULT    {fault}" for fault in faults) or "no fault")
    return 1 if faults else 0


def _spec(folder: Path) -> Path:
    """MiniLM in fp32, which every CPU serves, and which is not searched for."""
    import yaml

    spec = load_spec("minilm")
    data: dict[str, Any] = spec.model_dump(mode="json")
    data["precision"]["cpu"] = "fp32"
    file = folder / "chaos.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


if __name__ == "__main__":
    main()
