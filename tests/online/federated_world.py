"""Clients that learn by arithmetic, certificates that are thrown away, and what both come to by hand. Run as a module,
it is a coordinator or a client in a process of its own."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from online.federated import aggregate, wire
from online.federated.client import FederatedClient, PartTaken
from online.federated.coordinator import Coordinator, Offer
from online.federated.door import listening
from online.federated.errors import TooFewClients
from online.federated.keeping import RoundFiles
from online.federated.local import Learnt, Lesson
from online.federated.plan import FederatedPlan
from online.federated.tensors import Floats, Shapes, Tensors, shapes_of
from online.federated.tls import TlsIdentity
from online.learner.recipe import UpdateRecipe

FIRST: dict[str, Floats] = {
    "a": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "b": np.ones(5, np.float32),
}
SAMPLES = {"amber": 30, "birch": 10, "cedar": 20, "delta": 25, "elm": 15}


def plan(**given: object) -> FederatedPlan:
    return FederatedPlan.model_validate(
        {"rounds": 4, "local_steps": 2, "gather_s": 0, "deadline_s": 30, "max_norm": 10, **given}
    )


def offer(of: FederatedPlan) -> Offer:
    recipe = UpdateRecipe(steps=of.rounds * of.local_steps)
    return Offer(key="k" * 64, architecture="architecture", window=16, recipe=recipe, plan=of)


def moved(client: str, weights: Tensors) -> dict[str, Floats]:
    """A third of the way to where this client wants to be."""
    target = 1 + list(SAMPLES).index(client)
    return {name: ((target - value) / 3).astype(np.float32) for name, value in weights.items()}


def by_hand(clients: Sequence[str], of: FederatedPlan, first: Tensors = FIRST) -> dict[str, Floats]:
    """The weights after all rounds in which just these clients answer."""
    weights, velocity = dict(first), {name: np.zeros_like(value) for name, value in first.items()}
    share = aggregate.shares({client: SAMPLES[client] for client in clients}, of.max_share)
    for _ in range(of.rounds):
        for name in weights:
            step = sum(share[client] * moved(client, weights)[name] for client in clients)
            velocity[name] = of.outer_momentum * velocity[name] + step
            weights[name] = weights[name] + of.outer_rate * (step + of.outer_momentum * velocity[name])
    return weights


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Mover:
    """A learner that knows where it wants to be."""

    client: str
    rounds: list[int] = field(default_factory=list)

    def shapes(self, lesson: Lesson) -> Shapes:
        return shapes_of(FIRST)

    def learn(self, lesson: Lesson, weights: Tensors) -> Learnt:
        self.rounds.append(lesson.number)
        return Learnt(moved(self.client, weights), 1.0, 2.0)


def hello(client: str, **given: object) -> wire.JoinHello:
    return wire.JoinHello.model_validate(
        {"architecture": "architecture", "window": 16, "samples": SAMPLES[client], **given}
    )


def issue(folder: Path, names: Sequence[str], authority: object = None) -> dict[str, TlsIdentity]:
    """Of one authority, which is left in `folder` too."""
    import trustme

    signs = authority or trustme.CA(key_type=trustme.KeyType.ECDSA)
    folder.mkdir(parents=True, exist_ok=True)
    signs.cert_pem.write_to_path(folder / "ca.pem")
    found = {}
    for name in names:
        made = signs.issue_cert("127.0.0.1", common_name=name, key_type=trustme.KeyType.ECDSA)
        chain, key = folder / f"{name}.pem", folder / f"{name}.key"
        made.cert_chain_pems[0].write_to_path(chain)
        made.private_key_pem.write_to_path(key)
        found[name] = TlsIdentity(chain, key, folder / "ca.pem")
    return found


def identity_in(folder: Path, name: str) -> TlsIdentity:
    return TlsIdentity(folder / f"{name}.pem", folder / f"{name}.key", folder / "ca.pem")


def require_same(found: Tensors, expected: Tensors) -> None:
    assert set(found) == set(expected)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)


@contextlib.contextmanager
def running(coordinator: Coordinator, folder: Path) -> Iterator[tuple[str, threading.Thread, list[object]]]:
    """It listens, and drives its rounds in a thread; what that came to is put into the list."""
    ended: list[object] = []

    def drive() -> None:
        try:
            ended.append(coordinator.run())
        except TooFewClients as error:
            ended.append(error)

    with listening(coordinator, "127.0.0.1:0", identity_in(folder, "coordinator")) as port:
        thread = threading.Thread(target=drive, daemon=True)
        thread.start()
        yield f"127.0.0.1:{port}", thread, ended
        thread.join(60)
        assert not thread.is_alive()


def clients(
    address: str, folder: Path, learners: Sequence[Mover]
) -> tuple[list[threading.Thread], dict[str, PartTaken | Exception]]:
    found: dict[str, PartTaken | Exception] = {}

    def take_part(learner: Mover) -> None:
        client = FederatedClient(address, identity_in(folder, learner.client), hello(learner.client), learner)
        try:
            found[learner.client] = client.run(60)
        except Exception as error:  # noqa: BLE001  # whatever it is, the test looks at it
            found[learner.client] = error

    threads = [threading.Thread(target=take_part, args=(learner,), daemon=True) for learner in learners]
    for thread in threads:
        thread.start()
    return threads, found


def main(role: str, certificates: str, *rest: str) -> None:
    folder = Path(certificates)
    if role == "coordinator":
        port, files = int(rest[0]), RoundFiles(Path(rest[1]))
        coordinator = Coordinator(
            offer(plan(clients=2, gather_s=30)), files, FIRST, lambda said: print(said, flush=True)
        )
        with listening(coordinator, f"127.0.0.1:{port}", identity_in(folder, "coordinator")):
            coordinator.run()
    else:
        name, address = rest
        client = FederatedClient(
            address, identity_in(folder, name), hello(name), Mover(name), lambda said: print(said, flush=True)
        )
        print(client.run(120).rounds, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
