"""A client of federated rounds: its own model of the same kind, and its own text, from a file or its feedback."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from builders.judging import corpus
from builders.judging.corpus import Document
from builders.spec import DeploymentSpec
from online.federated.client import FederatedClient, PartTaken
from online.federated.local import LocalLearner
from online.federated.tls import TlsIdentity
from online.federated.wire import JoinHello
from online.files import lock_beside
from online.gate.architecture import fingerprint
from online.learner.memory import load_memory
from online.loop.due import Samples, require_window
from online.loop.federating import FOLDER, require_language_model
from online.loop.first import adopt
from online.loop.gathered import gather, split_rows
from online.loop.journal import LoopFiles
from online.loop.settings import online_of
from runtime.errors import InputError


def take_part(
    spec: DeploymentSpec, files: LoopFiles, documents: Sequence[Document], address: str, identity: TlsIdentity,
    say: Callable[[str], None], most_s: float,
) -> PartTaken:  # fmt: skip
    """Joins, and learns each round from `documents`, of which a part is held out: it only judges. Raises InputError,
    Unavailable, and MachineError while another process takes part from this build folder."""
    with own_learner(spec, files, documents) as own:
        hello = JoinHello(
            architecture=fingerprint(files.checkpoint(0)), window=online_of(spec).learner.window, samples=len(own.rows)
        )
        found = FederatedClient(address, identity, hello, own, say).run(most_s)
        if found.done:
            own.forget()
    return found


@contextmanager
def own_learner(spec: DeploymentSpec, files: LoopFiles, documents: Sequence[Document]) -> Iterator[LocalLearner]:
    """Of this machine's `documents`, a part of which is held out; nobody else learns in this build folder meanwhile."""
    require_language_model(spec)
    learner, base = online_of(spec).learner, files.checkpoint(0)
    _, task = adopt(spec, base)
    require_window(load_memory(base), task, learner.window)
    learnt, held_out = split_rows(documents, learner.held_out_share, task)
    if not len(learnt):
        raise InputError(
            "texts to learn from", got=f"{len(documents)} texts, too short for one row of {learner.window} tokens",
            expected="one row at least", fix="give more text",
        )  # fmt: skip
    folder = files.folder / FOLDER
    with lock_beside(folder / "client", "federated client in"):
        yield LocalLearner(task, base, learnt, held_out, folder)


def own_documents(
    spec: DeploymentSpec, base: Path, texts: Path | None, store: Callable[[], Samples]
) -> tuple[Document, ...]:
    """Of a file, a text a line; or all that the store has for a language model. Raises InputError, and
    FeedbackUnavailable. `base`: where the first version lies, or will lie."""
    if texts is not None:
        return tuple(Document(line, (line,)) for line in corpus.texts(texts, None))
    _, task = adopt(spec, base)
    with closing(store()) as opened:
        found = gather(opened.read(0), 0, online_of(spec).learner.min_rating, task).documents
    if not found:
        raise InputError(
            "feedback", got="none that a language model learns from", expected="some, or --texts FILE",
            fix="add some: `trireme online feedback add FILE --spec SPEC`",
        )  # fmt: skip
    return found
