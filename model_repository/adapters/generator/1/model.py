"""Triton adapter: prompts -> streams of text. Thin on purpose: the work is in `runtime.generation`.

`execute` only queues. One thread steps the engine, one sends: it joins what came since it last sent, and keeps to an
interval between two responses of a stream, so a slow client or a fast model costs fewer responses, not slower steps.
One thread turns long prompts into tokens and schemas into grammars, one after the other, while short prompts pass.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from runtime.encoding.encoder import require_numpy_1
from runtime.errors import BadRequest, ServingError, TooLate, Unavailable
from runtime.generation.guides import GuideMaker
from runtime.generation.interface import INPUTS, PROBE_ID_VARIABLE, Asked, read_request
from runtime.generation.metrics import Exporter
from runtime.generation.opening import TOKENIZER_FILE, open_engine
from runtime.generation.request import Update, coalesce, join
from runtime.generation.token_texts import TokenTexts
from runtime.proof.proven import ProvenExporter
from runtime.ranks.hosts import RANK_HOSTS_VARIABLE, Hosts
from runtime.settings import GeneratorModelSettings

NICENESS = 10
POLL_S = 0.1  # between two looks at whether a client has gone; each costs a message to the server
LAST_WORDS_S = 0.5  # for the other threads to tell clients what they were given
LONG = 16_000  # characters of a prompt; on an old CPU the tokenizer takes some 40 ms for them
DETAILED = 128  # tokens of a prompt whose details one response of a stream holds
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


@dataclass
class Stream:
    """A client that waits. `held` is what has not been sent: it did not ask for a stream, or got something just now."""

    sender: Any
    stream: bool
    logprobs: bool
    prompt_tokens: int
    echo: str = ""  # what the first response's text begins with
    details: bool = False
    prompt_details: bool = False
    sent_tokens: int = 0
    sent_logprobs: float = 0.0
    sent_at: float = 0.0
    held: Update | None = None


@dataclass(frozen=True)
class Arrival:
    """A request that was read: Triton may forget it."""

    sender: Any
    asked: Asked
    timeout_s: float | None
    came: float
    probe: bool


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        require_numpy_1()
        if args["model_instance_kind"] == "CPU":
            os.nice(NICENESS)  # requests and responses pass through the server on the same cores
        directory = Path(args["model_repository"]) / args["model_version"]
        self.settings = GeneratorModelSettings.load(directory)
        hosts = Hosts.from_text(os.environ.get(RANK_HOSTS_VARIABLE))
        device = int(args["model_instance_device_id"])
        self.engine, self.tokenizer = open_engine(self.settings, directory, device, hosts)
        limits = self.engine.limits
        self.guides = GuideMaker(directory / TOKENIZER_FILE, limits.vocabulary, limits.possible_end_ids)
        self.texts = TokenTexts(self.tokenizer.fast)
        self.probe_id = os.environ.get(PROBE_ID_VARIABLE)  # other users of the machine cannot read it
        self.streams: dict[int, Stream] = {}
        self.lock = threading.Lock()  # a request must be in `streams` before its first update is sent
        self.early: set[int] = set()  # streams whose tokens are held because they got some just now
        self.stopped = threading.Event()
        self.exporter = Exporter(pb_utils.MetricFamily, self.settings.served)
        self.long: queue.Queue[Arrival] = queue.Queue(self.settings.queue_size)
        work = (lambda: self.engine.run(self.stopped), self._send, self._submit_long)
        self.threads = [self._thread(item) for item in work]
        repository = directory.parent.resolve().parent  # Triton may be shown links
        self.proven = ProvenExporter(pb_utils.MetricFamily, self.settings.served, repository, os.getppid())

    def _thread(self, work: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException:  # noqa: BLE001 - without this thread nobody gets an answer: the launcher starts anew
                traceback.print_exc()
                time.sleep(LAST_WORDS_S)
                os._exit(1)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def execute(self, requests: list[Any]) -> None:
        for request in requests:
            sender = request.get_response_sender()
            _answering(sender, partial(self._accept, request, sender))

    def _accept(self, request: Any, sender: Any) -> None:
        tensors = {tensor.name: pb_utils.get_input_tensor_by_name(request, tensor.name) for tensor in INPUTS}
        given = {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}
        asked = read_request(given, json.loads(request.parameters() or "{}"))
        arrival = Arrival(
            sender,
            asked,
            timeout_s=request.timeout() / 1e6 or asked.timeout_s or self.settings.timeout_s,
            came=time.monotonic(),
            probe=request.request_id() == self.probe_id,
        )
        if len(asked.text or "") <= LONG and asked.schema is None:
            self._submit(arrival)
            return
        try:
            self.long.put_nowait(arrival)
        except queue.Full:
            said = f"{self.settings.queue_size} long prompts or schemas wait already; try again later"
            raise Unavailable(said) from None

    def _submit_long(self) -> None:
        while not self.stopped.is_set():
            with contextlib.suppress(queue.Empty):
                arrival = self.long.get(timeout=POLL_S)
                if arrival.sender.is_cancelled():
                    _refuse(arrival.sender, None)
                else:
                    _answering(arrival.sender, partial(self._submit, arrival))

    def _submit(self, arrival: Arrival) -> None:
        asked = arrival.asked
        prompt = self.tokenizer.prompt(asked)
        guide = None if asked.schema is None else self.guides.guide(asked.schema)
        left_s = None if arrival.timeout_s is None else arrival.timeout_s - (time.monotonic() - arrival.came)
        params, echo = asked.params, self.tokenizer.echo(asked)
        stream = Stream(
            arrival.sender, asked.stream, params.logprobs, len(prompt), echo, asked.details, params.prompt_logprobs
        )
        with self.lock:
            number = self.engine.submit(prompt, params, timeout_s=left_s, probe=arrival.probe, guide=guide)
            self.streams[number] = stream

    def _send(self) -> None:
        polled = exported = 0.0
        while not self.stopped.is_set():
            wait_s = min(POLL_S, self.settings.stream_interval_s) if self.early else POLL_S
            updates = coalesce(self.engine.take_updates(wait_s=wait_s))
            for number in self.early - updates.keys():  # a step that takes long holds up nothing that is there
                updates[number] = Update(number)
            for number, update in updates.items():
                self._deliver(number, update)
            now = time.monotonic()
            if now - polled > POLL_S:
                polled = now
                self._cancel()
            if now - exported > 1.0:
                exported = now
                self.exporter.export(self.engine.counters, self.engine.gauges())
                self.proven.look()

    def _deliver(self, number: int, update: Update) -> None:
        with self.lock:
            stream = self.streams[number]
            if update.finish is not None:
                del self.streams[number]
        self.early.discard(number)
        update = update if stream.held is None else join(stream.held, update)
        if update.finish is None and not self._due(stream, update):
            stream.held = update
            if stream.stream and (update.tokens or update.prompt):
                self.early.add(number)
            return
        stream.held, stream.sent_at = None, time.monotonic()
        while stream.stream and len(update.prompt) > DETAILED:
            part, update = _cut(update)
            stream.sender.send(self._response(stream, part), 0)
        stream.sent_tokens += len(update.tokens)
        stream.sent_logprobs += sum(update.logprobs)
        if update.error is None and update.finish != "cancelled":
            stream.sender.send(self._response(stream, update), FINAL if update.finish else 0)
            return
        if update.error is not None and stream.stream and update.tokens:  # they were made before the fault
            stream.sender.send(self._response(stream, update._replace(finish=None)), 0)
        _refuse(stream.sender, update.error)

    def _due(self, stream: Stream, update: Update) -> bool:
        """The first piece goes out at once, the others no sooner than an interval after the last."""
        if not stream.stream or not (update.text or update.tokens or update.prompt):
            return False
        return not stream.sent_tokens or time.monotonic() - stream.sent_at >= self.settings.stream_interval_s

    def _response(self, stream: Stream, update: Update) -> Any:
        text, stream.echo = stream.echo + update.text, ""
        tensors = [
            # Without the batch dimension: so TensorRT-LLM's models answer, and their clients read `text_output[0]`.
            pb_utils.Tensor("text_output", np.array([text.encode()], np.object_)),
            pb_utils.Tensor("output_ids", np.array([update.tokens], np.int32)),
        ]
        if stream.logprobs:
            tensors += [
                pb_utils.Tensor("output_log_probs", np.array([update.logprobs], np.float32)),
                pb_utils.Tensor("cum_log_probs", np.array([[stream.sent_logprobs]], np.float32)),
            ]
        if stream.details:
            tensors.append(_text("output_details", self.texts.output_details(update)))
        if stream.prompt_details:
            tensors.append(_text("prompt_details", self.texts.details(update.prompt)))
        if update.finish is not None:
            tensors += [
                pb_utils.Tensor("prompt_tokens", np.array([[stream.prompt_tokens]], np.int32)),
                pb_utils.Tensor("cached_tokens", np.array([[update.cached]], np.int32)),
                pb_utils.Tensor("completion_tokens", np.array([[stream.sent_tokens]], np.int32)),
                _text("finish_reason", update.finish),
            ]
        return pb_utils.InferenceResponse(tensors)

    def _cancel(self) -> None:
        with self.lock:
            streams = list(self.streams.items())
        for number, stream in streams:
            if stream.sender.is_cancelled():
                self.engine.cancel(number)

    def finalize(self) -> None:
        self.stopped.set()
        for thread in self.threads:
            thread.join(10)
        if not any(thread.is_alive() for thread in self.threads):  # a step that goes on still uses the memory
            self.engine.executor.close()


def _text(name: str, value: str) -> Any:
    return pb_utils.Tensor(name, np.array([[value.encode()]], np.object_))


def _cut(update: Update) -> tuple[Update, Update]:
    """The details of a prompt's first tokens, and the rest of the update."""
    first, rest = update.prompt[:DETAILED], update.prompt[DETAILED:]
    return Update(update.request, prompt=first), update._replace(prompt=rest)


def _answering(sender: Any, work: Callable[[], None]) -> None:
    """Does the work, or tells the client why not."""
    try:
        work()
    except ServingError as error:
        _refuse(sender, error)
    except Exception:  # noqa: BLE001 - Triton would send the stack, with paths, to the caller
        traceback.print_exc()
        _refuse(sender, ServingError("the request failed; the server log has the cause"))


def _refuse(sender: Any, error: ServingError | None) -> None:
    """Ends a stream without a result. No error: its client has gone. The text begins with the status."""
    kinds = {BadRequest: "INVALID_ARGUMENT", Unavailable: "UNAVAILABLE", TooLate: "DEADLINE_EXCEEDED"}
    status = "CANCELLED" if error is None else kinds.get(type(error), "INTERNAL")
    message = f"{status}: {'the request was cancelled' if error is None else error}"
    # Triton's own names: a shorter one, and none for a deadline.
    kind = {"INVALID_ARGUMENT": "INVALID_ARG", "DEADLINE_EXCEEDED": "CANCELLED"}.get(status, status)
    error_object = pb_utils.TritonError(message, getattr(pb_utils.TritonError, kind))
    sender.send(pb_utils.InferenceResponse(error=error_object), FINAL)
