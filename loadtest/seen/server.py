"""The server under test, seen from outside: can it be measured, which weights does it serve, what did it count."""

from __future__ import annotations

import difflib
import http.client
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from loadtest.errors import LoadInputError
from loadtest.requests.connection import Connection, Protocol
from loadtest.requests.interface import Interface, RequestError, interface_from_metadata
from loadtest.requests.prompts import Prompt
from loadtest.requests.streaming import Stream, StreamConnection, require_generator, streams_text
from loadtest.seen.counters import Counters, generator_counters
from loadtest.seen.proof import ProofFigure, proof_from_metrics
from runtime.channel import connect
from runtime.prometheus import fetch, model_labels
from runtime.record import Record

UNKNOWN = "unknown"
CONTROL_TIMEOUT_S = 5.0


class Identity(Record):
    """The weights that were measured, as the service itself names them; `unknown` where it does not."""

    model: str
    version: str = UNKNOWN
    precision: str = UNKNOWN
    digest: str = UNKNOWN  # of the model's artifact
    spec_digest: str = UNKNOWN


@dataclass(frozen=True)
class TestedServer:
    """A server that answered a trial request over every protocol of the plan."""

    interface: Interface | None  # None: a generator
    triton_version: str
    models: tuple[str, ...]  # the model itself and, of an ensemble, its parts
    trial_tokens: int = 0  # of a generator's answers
    trial_requests: int = 0  # of an encoder

    @property
    def ensemble(self) -> str | None:
        return self.models[0] if len(self.models) > 1 else None


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment. Differences of two are what happened in between."""

    at: float  # time.monotonic()
    statistics: Counters
    client_cpu_s: float
    server_cpu_s: float | None
    identity: Identity | None
    proof: tuple[ProofFigure, ...] = ()
    generator: Mapping[str, float] | None = None  # its own counters, empty where it has none; None: not readable
    faults: tuple[str, ...] = field(default=())  # what could not be read, and why


def probe(
    model: str,
    addresses: Mapping[Protocol, str],
    grpc_address: str,
    rows: Sequence[str],
    prompts: Sequence[Prompt],
    key: str | None = None,
) -> TestedServer:
    """Asks everything that a run needs once, so that a wrong plan fails in a second and not after an hour.

    Requests go to `addresses`, with the `key` that a gateway there asks for; `grpc_address` is the server's own.
    `rows` are asked of an encoder; of a generator, that one of the `prompts` that has the most tokens.
    Raises LoadInputError: nobody listens, no such model, not ready, a model of another kind, or a trial fails.
    """
    from tritonclient.utils import InferenceServerException

    client = connect(grpc_address)
    try:
        triton_version = client.get_server_metadata(as_json=True, client_timeout=CONTROL_TIMEOUT_S)["version"]
        if not client.is_model_ready(model, client_timeout=CONTROL_TIMEOUT_S):
            raise _not_ready(client, model)
        config = client.get_model_config(model, as_json=True, client_timeout=CONTROL_TIMEOUT_S)["config"]
    except InferenceServerException as error:
        raise LoadInputError(
            f"gRPC address {grpc_address}",
            got=" ".join((error.message() or str(error)).split()),
            expected="a Triton server that answers",
            fix="start the server (`trireme serve SPEC`), or give the address of its gRPC port",
        ) from error
    finally:
        client.close()
    steps = config.get("ensemble_scheduling", {}).get("step", [])
    models = tuple(dict.fromkeys([model, *(step["model_name"] for step in steps)]))
    if prompts:
        tokens = _try_streams(addresses["grpc"], model, prompts, key)
        return TestedServer(interface=None, triton_version=triton_version, models=models, trial_tokens=tokens)
    interfaces = [_try_once(protocol, address, model, rows, key) for protocol, address in addresses.items()]
    return TestedServer(interfaces[0], triton_version, models, trial_requests=len(interfaces))


def _not_ready(client: Any, model: str) -> LoadInputError:
    from tritonclient.utils import InferenceServerException

    try:
        index = client.get_model_repository_index(as_json=True, client_timeout=CONTROL_TIMEOUT_S).get("models", [])
    except InferenceServerException:  # control of the repository may be closed to us
        index = []
    states = {entry["name"]: f"{entry.get('state', 'not loaded')} {entry.get('reason', '')}".strip() for entry in index}
    if model in states:
        fix = "load the model, or read the server's log for the reason"
        return LoadInputError(f"model {model!r}", got=f"state {states[model]}", expected="state READY", fix=fix)
    near = difflib.get_close_matches(model, states, n=1)
    known = ", ".join(sorted(states)) or "the models that the server has loaded"
    fix = f"did you mean {near[0]!r}?" if near else f"use one of: {known}"
    return LoadInputError(f"model {model!r}", got="a name that the server does not have", expected="its model", fix=fix)


def _try_once(protocol: Protocol, address: str, model: str, rows: Sequence[str], key: str | None) -> Interface:
    limit_s = CONTROL_TIMEOUT_S * 6  # the first request may pay for lazy loading
    connection = Connection(protocol, address, limit_s, key=key)
    try:
        metadata = connection.metadata(model)
        if streams_text(metadata):
            raise _other_kind(model, "a generator, which streams text", "an encoder: text in, vectors out")
        interface = interface_from_metadata(metadata)
        connection.ask(model, interface, [[row] * len(interface.inputs) for row in rows])
    except RequestError as error:
        raise LoadInputError(
            f"a trial request of {len(rows)} text(s) to model {model!r} over {protocol} at {address}",
            got=f"{error.kind}: {error.message}",
            expected="a finite vector for each text",
            fix=f"check the {protocol} address, the texts, and texts_per_request against the model's batch size",
        ) from error
    finally:
        connection.close()
    return interface


def _try_streams(address: str, model: str, prompts: Sequence[Prompt], key: str | None) -> int:
    """Tokens that came. Only the server knows its tokens: each prompt is asked for one, and the one that it calls the
    longest is asked for its whole answer.
    """
    connection = Connection("grpc", address, CONTROL_TIMEOUT_S, key=key)
    try:
        metadata = connection.metadata(model)
    except RequestError as error:
        raise _trial_failed(model, address, error) from error
    finally:
        connection.close()
    if not streams_text(metadata):
        raise _other_kind(model, "a model that does not stream text", "a generator")
    require_generator(metadata, "grpc")
    streams = StreamConnection(address, CONTROL_TIMEOUT_S * 12, key)  # the longest answer, and lazy loading
    tokens = 0

    def ask(prompt: Prompt) -> Stream:
        stream = streams.ask(model, prompt, time.perf_counter())
        if stream.error is not None:
            raise _trial_failed(model, address, stream.error)
        return stream

    try:
        if len(prompts) > 1:
            short = [ask(replace(prompt, output_tokens=1)) for prompt in prompts]
            tokens += sum(stream.tokens for stream in short)
            longest = max(zip(short, prompts, strict=True), key=lambda pair: pair[0].prompt_tokens)[1]
        else:
            (longest,) = prompts
        return tokens + ask(longest).tokens
    finally:
        streams.close()


def _trial_failed(model: str, address: str, error: RequestError) -> LoadInputError:
    return LoadInputError(
        f"a trial request to model {model!r} over grpc at {address}",
        got=f"{error.kind}: {error.message}",
        expected="a stream of tokens for the longest prompt and the longest answer of the load",
        fix="shorten the prompts or the answers (--prompt-words, --output-tokens), or free the server",
    )


def _other_kind(model: str, got: str, expected: str) -> LoadInputError:
    return LoadInputError(
        f"model {model!r}", got=got, expected=expected, fix="give the spec of the service that runs there"
    )


def snapshot(
    model: str, target: TestedServer, grpc_address: str, metrics_address: str | None, client_pid: int
) -> Snapshot:
    """Never raises for what a server may lack: what could not be read is named in `faults`."""
    from tritonclient.utils import InferenceServerException

    statistics: dict[tuple[str, str], Mapping[str, Any]] = {}
    faults: list[str] = []
    client = connect(grpc_address)
    try:
        for name in target.models:
            answer = client.get_inference_statistics(name, as_json=True, client_timeout=CONTROL_TIMEOUT_S)
            for entry in answer.get("model_stats", []):
                if name == target.ensemble:
                    entry.pop("batch_stats", None)  # an ensemble forms no batches; Triton repeats the requests' sizes
                statistics[name, entry["version"]] = entry
    except InferenceServerException as error:
        faults.append(f"Triton's statistics could not be read: {error.message()}")
    finally:
        client.close()
    identity, generator, proof = None, None, tuple[ProofFigure, ...]()
    if metrics_address is not None:
        try:
            page = fetch(f"http://{metrics_address}/metrics")
            identity, generator = identity_from_metrics(page, model), generator_counters(page, model)
            proof = proof_from_metrics(page, model, identity.version) if identity is not None else ()
        except (OSError, http.client.HTTPException) as error:
            faults.append(f"the metrics at {metrics_address} could not be read: {error}")
    return Snapshot(
        at=time.monotonic(),
        statistics=statistics,
        client_cpu_s=cpu_seconds(client_pid) or 0.0,
        server_cpu_s=cpu_seconds(listening_process(grpc_address)),
        identity=identity,
        proof=proof,
        generator=generator,
        faults=tuple(faults),
    )


def request_counts(grpc_address: str, model: str) -> tuple[int, int] | None:
    """Requests of a model that its server has answered and failed since it was loaded; None when it does not say.

    The same counters as `nv_inference_request_success` and `nv_inference_request_failure`.
    """
    from tritonclient.utils import InferenceServerException

    client = connect(grpc_address)
    try:
        answer = client.get_inference_statistics(model, as_json=True, client_timeout=CONTROL_TIMEOUT_S)
    except InferenceServerException:
        return None
    finally:
        client.close()
    parts = [entry.get("inference_stats", {}) for entry in answer.get("model_stats", [])]
    return (
        sum(int(part.get("success", {}).get("count", 0)) for part in parts),
        sum(int(part.get("fail", {}).get("count", 0)) for part in parts),
    )


def identity_from_metrics(text: str, model: str) -> Identity | None:
    """The gauge `trireme_model_info{model=…} 1` in Prometheus text. Of several versions that are served, the highest.

    None: the service does not say what it serves.
    """
    found = [
        Identity(**{key: labels.get(key) or UNKNOWN for key in Identity.model_fields})
        for labels in model_labels(text)
        if labels.get("model") == model
    ]
    return max(found, key=lambda one: (int(one.version) if one.version.isdigit() else -1, one.version), default=None)


def listening_process(address: str) -> int | None:
    """Id of the process of this machine that listens at `address`; None when it is elsewhere, or not ours to see."""
    import psutil

    host, _, port = address.rpartition(":")
    if host not in ("127.0.0.1", "localhost"):
        return None
    try:
        sockets = psutil.net_connections(kind="tcp")
    except psutil.AccessDenied:
        return None
    wanted = (one.pid for one in sockets if one.status == psutil.CONN_LISTEN and one.laddr.port == int(port))
    return next(wanted, None)


def cpu_seconds(pid: int | None) -> float | None:
    """User and system time of a process and its living descendants; None when there is no such process."""
    import psutil

    if pid is None:
        return None
    try:
        process = psutil.Process(pid)
        family = [process, *process.children(recursive=True)]
    except psutil.Error:
        return None
    total = 0.0
    for member in family:
        try:
            times = member.cpu_times()
        except psutil.Error:  # ended between the two calls
            continue
        total += times.user + times.system
    return total
