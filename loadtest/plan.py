"""What a load test is asked to do, and what it leaves behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from loadtest.errors import LoadInputError
from loadtest.requests.connection import Protocol
from loadtest.requests.prompts import StreamLoad
from loadtest.seen.counters import Ledger, RequestLedger
from loadtest.seen.recording import Trace
from loadtest.seen.server import Snapshot, TestedServer
from loadtest.shapes import DRAIN_SLACK_S, EARLY_DRAIN_S, SETTLE_S, Schedule, Shape
from runtime.record import Record

Address = Annotated[str, Field(pattern=r"^[A-Za-z0-9.-]+:[0-9]{1,5}$")]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]

START_LIMIT_S = 60  # for Locust to import, and for its workers to meet
STOP_LIMIT_S = 10  # for Locust to leave after its last word
EARLY_END_LIMIT_S = EARLY_DRAIN_S + 30  # for Locust to end early, with the reports of its workers


class ThroughGateway(Record):
    """A gateway that requests go through."""

    grpc_address: Address | None = None
    http_address: Address | None = None
    key_file: Path | None = Field(None, description="holds the key that the gateway asks for")


class LoadPlan(Record):
    """What to measure and how. Addresses are `host:port`."""

    model: Annotated[str, Field(min_length=1)]
    texts_file: Path = Field(description="UTF-8, one text a line")
    grpc_address: Address = Field("127.0.0.1:8001", description="always needed: statistics are read there")
    http_address: Address = "127.0.0.1:8000"
    metrics_address: Address | None = "127.0.0.1:8002"
    gateway: ThroughGateway | None = Field(None, description="none: requests go to the server's own ports")
    protocol: Literal["grpc", "http", "both"] = Field("grpc", description="both: half of the users each")
    shape: Shape = "constant"
    users: Positive = 8
    steps: Annotated[int, Field(ge=2, le=50)] = Field(5, description="plateaux of the shape `steps`")
    duration_s: Positive = Field(60, description="measured, after the warm-up")
    warm_up_s: NotNegative = Field(5, description="does not count")
    texts_per_request: Positive = 1
    request_timeout_s: Annotated[float, Field(gt=0)] = Field(10.0, description="of a whole answer, to its last token")
    rate_per_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="requests that are started in a second at random moments, by all users together, whatever the "
        "answers do; none: each user waits for its answer",
    )
    stream: StreamLoad | None = Field(None, description="the model is a generator, and this is asked of it")
    seed: int = 0
    processes: Positive = Field(1, description="Locust workers; more than 1 when one core cannot make the load")

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.shape, self.users, self.warm_up_s, self.duration_s, self.steps)

    @property
    def addresses(self) -> dict[Protocol, str]:
        """Where requests go, by protocol."""
        door = self.gateway or self
        every: dict[Protocol, str | None] = {"grpc": door.grpc_address, "http": door.http_address}
        wanted = {name: address for name, address in every.items() if self.protocol in (name, "both")}
        return {name: address for name, address in wanted.items() if address is not None}

    @property
    def key_file(self) -> Path | None:
        return None if self.gateway is None else self.gateway.key_file

    @property
    def limit_s(self) -> float:
        """Wall clock after which the load generator is stopped, whatever it does."""
        return START_LIMIT_S + self.schedule.end_s + self.request_timeout_s + 2 * DRAIN_SLACK_S + STOP_LIMIT_S


class RunProgress(Record):
    """How far a run is; `answered` and `errors` count from its start, the warm-up included."""

    elapsed_s: float
    end_s: float
    users: int
    answered: int
    errors: int


@dataclass(frozen=True)
class Evidence:
    """Everything that a report is made of. The snapshots enclose the measured window to within a second or two."""

    plan: LoadPlan
    texts: tuple[str, ...]
    target: TestedServer
    trace: Trace
    before: Snapshot
    after: Snapshot
    ledger: Ledger | None = None  # none: the server does not count tokens
    requests: RequestLedger | None = None


def check_plan(plan: LoadPlan) -> None:
    """What the types cannot say. Raises LoadInputError."""
    if plan.stream is not None and (plan.protocol != "grpc" or plan.texts_per_request != 1):
        raise LoadInputError(
            f"protocol={plan.protocol} with texts_per_request={plan.texts_per_request}",
            got="a load that a generator does not take",
            expected="one prompt a request, over grpc: text is streamed there",
            fix="use protocol grpc and texts_per_request 1",
        )
    _check_door(plan)
    if plan.shape == "steps" and plan.duration_s < plan.steps * (SETTLE_S + 3):
        raise LoadInputError(
            f"duration_s={plan.duration_s} with steps={plan.steps}",
            got=f"{plan.duration_s / plan.steps:.3g} s a step",
            expected=f"{SETTLE_S + 3} s or more, of which the first {SETTLE_S} do not count",
            fix=f"use duration_s={plan.steps * (SETTLE_S + 3)} or more, or fewer steps",
        )
    if plan.users < max(plan.processes, plan.steps if plan.shape == "steps" else 1, len(plan.addresses)):
        raise LoadInputError(
            f"users={plan.users}",
            got="fewer users than steps, processes or protocols",
            expected="at least one user for each",
            fix="use more users, or fewer of the others",
        )


def _check_door(plan: LoadPlan) -> None:
    if plan.gateway is None:
        return
    door = {"grpc": plan.gateway.grpc_address, "http": plan.gateway.http_address}
    for name, address in door.items():
        wanted = plan.protocol in (name, "both")
        if wanted and address is None:
            raise LoadInputError(
                f"a load over {name} through the gateway",
                got=f"no address of the gateway's {name} port",
                expected="one, as host:port",
                fix="give --gateway-grpc for grpc, --gateway for http, or another --protocol",
            )
        if address is not None and not wanted:
            raise LoadInputError(
                f"the gateway's {name} address",
                got=f"{address}, where nothing is sent over {name}",
                expected=f"protocol {name} or both",
                fix="leave the address out, or choose another --protocol",
            )


def key_of(plan: LoadPlan) -> str | None:
    """That a gateway asks for. Raises LoadInputError for a file that cannot be read."""
    if plan.key_file is None:
        return None
    try:
        return plan.key_file.read_text().strip()
    except (OSError, ValueError) as error:
        raise LoadInputError(
            f"the key in {plan.key_file}", got=str(error), expected="a file with the key on a line",
            fix="give --api-key-file a file that can be read",
        ) from error  # fmt: skip
