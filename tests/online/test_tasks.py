"""Embeddings and classifiers learn, keep what they knew as far as they are told to, and are judged by what they do."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from builders.checkpoint import load_checkpoint
from builders.digests import file_digest
from builders.export.weights import load_encoder
from builders.judging.corpus import mixed
from builders.spec import DeploymentSpec
from builders.training import text
from online.gate.forgetting import NEAR, change_of
from online.gate.verdict import GateBudget, GateRefusal, GateVerdict, judge_candidate
from online.learner.memory import Memory, Reservoir, load_memory, save_memory
from online.learner.recipe import UpdateRecipe
from online.learner.update import UpdateReport, update_version
from online.loop import drift
from online.loop.gathered import gather
from online.loop.records import DriftState
from online.tasks.classifying import ACCURACY, ClassifierTask
from online.tasks.embedding import FOUND, EmbeddingTask, pair_document, right_too
from online.tasks.encoder import EncoderTexts
from online.tasks.task import LearningTask, Rows, Scores, Training
from runtime.errors import InputError
from tests.conftest import save_tiny
from tests.online.encoders import LOOSE, RECIPE, labels, model_slice, opened, pairs, rows_of, save_first

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def embedding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("embedding"), "embedding")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_first(tmp_path_factory.mktemp("classifier"), "classification")


@pytest.fixture(params=["embedding", "classification"])
def version(request: pytest.FixtureRequest) -> tuple[Path, LearningTask, Rows, Rows]:
    """A version, its task, and rows of another domain: what the labels meant is another there."""
    kind = request.param
    folder: Path = request.getfixturevalue("classifier" if kind == "classification" else "embedding")
    task = opened(folder, kind)
    made = pairs if kind == "embedding" else labels
    more = {} if kind == "embedding" else {"wrong": True}
    return folder, task, *(rows_of(task, made("close", count, seed, **more)) for count, seed in ((120, 3), (60, 4)))


Version = tuple[Path, LearningTask, Rows, Rows]


def updated(version: Version, out: Path, recipe: UpdateRecipe = RECIPE, budget: GateBudget = LOOSE) -> UpdateReport:
    folder, task, learnt, held_out = version
    return update_version(task, folder, "two", learnt, held_out, out, recipe, budget=budget)


def judged(version: Version, candidate: Path, budget: GateBudget = LOOSE) -> GateVerdict:
    folder, task, _, held_out = version
    return judge_candidate(task, folder, candidate, ("two", held_out), dict(load_memory(folder).held_out), budget)


def test_the_new_is_learnt_and_only_so_much_of_the_old_is_lost(version: Version, tmp_path: Path) -> None:
    naive = RECIPE.model_copy(update={"replay_share": 0.0})
    updated(version, tmp_path / "naive", naive)
    lost = judged(version, tmp_path / "naive")
    assert lost.new is not None
    assert lost.new.high < -0.1
    budget = GateBudget(max_forgetting=0.05, max_fall=0.1)
    refused = judged(version, tmp_path / "naive", budget)
    assert {item.name for item in refused.objections} == {GateRefusal.FORGETTING}
    found = updated(version, tmp_path / "2", naive, budget)
    taken = next(one for one in found.step.tried if one.share == found.step.share)
    assert 0 < found.step.share < 1
    assert (taken.bound <= 0.05, taken.fall <= 0.1) == (True, True)
    held = judged(version, tmp_path / "2", GateBudget(max_forgetting=0.15, max_fall=0.25))  # other rows than chose it
    assert held.passed, held
    assert held.old[0].after < lost.old[0].after
    shares = {one.name: one for one in held.old[0].shares}
    assert shares.keys() == ({FOUND, NEAR} if NEAR in shares else {ACCURACY})


def test_a_pull_keeps_a_version_near_the_one_before(version: Version, tmp_path: Path) -> None:
    for name, pull in (("free", 0.0), ("pulled", 20.0)):
        updated(version, tmp_path / name, RECIPE.model_copy(update={"kl": pull, "steps": 15}))
    free, pulled = (judged(version, tmp_path / name).old[0] for name in ("free", "pulled"))
    if NEAR in {one.name for one in free.shares}:
        assert pulled.fall < 0.6 * free.fall
    assert pulled.after < free.after


def test_the_pull_is_zero_at_the_previous_version(version: Version) -> None:
    folder, task, learnt, _ = version
    model, previous = task.load(folder), task.load(folder)
    free, pulled = (task.loss(Training(model, previous, 4, pull, 0.05)) for pull in (0.0, 1.0))
    assert pulled(learnt[:8]).item() == pytest.approx(free(learnt[:8]).item(), abs=1e-5)


def test_vectors_that_may_not_move_are_not_moved(embedding: Path, tmp_path: Path) -> None:
    task, recipe = opened(embedding, "embedding"), RECIPE.model_copy(update={"steps": 3})
    learnt, held_out = (rows_of(task, pairs("close", 60, seed)) for seed in (3, 4))
    budget = GateBudget(max_forgetting=10, max_fall=0)
    found = update_version(task, embedding, "two", learnt, held_out, tmp_path / "2", recipe, budget=budget)
    assert found.step.share == 0
    assert min(one.fall for one in found.step.tried) > 0
    assert file_digest(tmp_path / "2" / "model.safetensors") == file_digest(embedding / "model.safetensors")


def test_a_killed_update_comes_to_the_same_weights(version: Version, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def die(progress: Any) -> None:
        if progress.step == 6:
            raise Killed

    folder, task, learnt, held_out = version
    recipe = RECIPE.model_copy(update={"steps": 10})
    with pytest.raises(Killed):
        update_version(task, folder, "two", learnt, held_out, tmp_path / "2", recipe, budget=LOOSE, report=die,
                       checkpoint_every_s=0.0)  # fmt: skip
    assert [file.name for file in tmp_path.iterdir()] == [".2.update"]
    updated(version, tmp_path / "2", recipe)
    updated(version, tmp_path / "again", recipe)
    assert len({file_digest(tmp_path / name / "model.safetensors") for name in ("2", "again")}) == 1


def test_low_rank_matrices_move_nothing_else(version: Version, tmp_path: Path) -> None:
    folder, *_ = version
    updated(version, tmp_path / "2", RECIPE.model_copy(update={"lora_rank": 2, "steps": 5}))
    before, after = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "2"))
    moved = {name for name, value in after.items() if not np.array_equal(value, before[name])}
    assert any("attention" in name for name in moved)
    assert all(before[name].ndim == 2 and "embeddings" not in name for name in moved)
    for name in moved:
        assert np.linalg.matrix_rank(after[name] - before[name], tol=1e-5) <= 2


def test_a_loss_of_a_batch_is_the_mean_of_its_rows(version: Version) -> None:
    """The one that is trained on and the one that judges are one, at the temperature that judges."""
    folder, task, learnt, _ = version
    model = task.load(folder)
    loss = task.loss(Training(model, model, 0, 0.0, 0.05))(learnt[:32]).item()
    assert loss == pytest.approx(float(task.scores(model, learnt[:32]).losses.mean()), rel=1e-3)


def test_vectors_are_those_of_the_service(embedding: Path) -> None:
    """Padding and order change nothing: each text alone gives the same."""
    texts = EncoderTexts(model_slice(embedding, "embedding"), load_checkpoint(model_slice(embedding, "embedding")), 16)
    ids = texts.pack(["a file", "the socket of a thread and a module of a class", "queue"])
    together = texts.outputs(texts.load(embedding), ids).numpy()
    alone = np.concatenate([texts.outputs(texts.load(embedding), row[None]).numpy() for row in ids])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_what_is_right_for_a_query_is_never_wrong_for_it() -> None:
    """Two rows with one text, one query with two texts, and a wrong text that is right for another row."""
    text = {name: [number] for number, name in enumerate(("q", "r", "s", "a", "b", "c"), 1)}
    rows = np.array([
        text["q"] + text["a"] + [-1], text["r"] + text["a"] + text["b"], text["q"] + text["b"] + text["c"],
        text["s"] + text["c"] + [-1],
    ])  # fmt: skip
    found = right_too(rows)
    #            a      a      b      c      b      c: the rows' own, then the wrong ones of rows 1 and 2
    assert found.tolist() == [
        [False, True, True, False, True, False],
        [True, False, False, False, False, False],
        [True, True, False, False, True, False],
        [False, False, False, False, False, True],
    ]


def test_a_wrong_text_is_learnt_from(embedding: Path) -> None:
    task = opened(embedding, "embedding")
    model = task.load(embedding)
    samples = pairs("open", 4, 1)
    plain = rows_of(task, samples)
    for one in samples:
        one["negative"] = f"not {one['positive']}"
    harder = rows_of(task, samples)
    losses = [task.scores(model, rows).losses.mean() for rows in (plain, harder)]
    assert losses[1] > losses[0]


def test_pairs_chosen_by_digest_are_held_out_as_asked() -> None:
    """As those of Python's docstrings are: the first of an order that is mixed by digest."""
    queries = mixed(f"what is number {number}" for number in range(2000))[:600]
    documents = [pair_document(query, "a text", "") for query in queries]
    learnt, held_out = text.split([one for one in documents if not isinstance(one, str)], 0.2)
    assert len(learnt) + len(held_out) == 600
    assert 80 <= len(held_out) <= 160


def test_what_says_nothing_is_counted_by_why(embedding: Path, classifier: Path) -> None:
    one = {"request_id": "r", "prompt": "a", "answer": None}
    given = [
        {**one, "kind": "correction", "text": "b"},
        {**one, "kind": "rating", "score": 1.0},
        {**one, "kind": "pair", "query": "a", "positive": " ", "negative": None},
        {**one, "kind": "pair", "query": "a", "positive": "b", "negative": "b"},
        {**one, "kind": "pair", "query": "a", "positive": "b", "negative": "c"},
        {**one, "kind": "label", "label": "LABEL_1"},
        {**one, "kind": "label", "label": "spam"},
        {**one, "kind": "label", "label": "LABEL_1", "prompt": None},
    ]
    found = gather(enumerate(given, 1), 0, 0.8, opened(embedding, "embedding"))
    assert [item.passages for item in found.documents] == [("a", "b", "c")]
    assert found.unread["a correction says nothing to an embedding model, which learns from pair"] == 1
    assert sum(found.unread.values()) == 7
    found = gather(enumerate(given, 1), 0, 0.8, opened(classifier, "classification"))
    assert [item.passages for item in found.documents] == [("1", "a")]
    assert found.unread["a label that the model does not have (it has LABEL_0, LABEL_1, LABEL_2)"] == 1
    assert found.unread["a label of a text that nobody kept"] == 1


def test_however_much_says_nothing_the_rest_is_read(embedding: Path) -> None:
    rating = {"request_id": "r", "kind": "rating", "score": 0.1, "prompt": None, "answer": None}
    samples = itertools.chain(itertools.repeat(rating, 100), pairs("open", 9, 1))
    found = gather(enumerate(samples, 1), 0, 0.8, opened(embedding, "embedding"), most=5)
    assert (len(found.documents), found.fed_to, sum(found.unread.values())) == (5, 105, 100)


@pytest.mark.parametrize("kind", ["embedding", "classification"])
def test_drift_is_seen_where_the_data_moves_and_not_where_it_stays(
    kind: str, embedding: Path, classifier: Path
) -> None:
    folder = embedding if kind == "embedding" else classifier
    task = opened(folder, kind)
    made = pairs if kind == "embedding" else labels
    known = load_memory(folder).held_out["one"]
    moved = {"verbs": "yesterday in the garden grew roses" if kind == "embedding" else "open", "count": 120, "seed": 6}
    moved |= {} if kind == "embedding" else {"wrong": True}
    rises = []
    for fresh in (made("open", 120, 5), made(**moved)):  # type: ignore[arg-type]
        usual, new = task.surprise(task.load(folder), known, rows_of(task, fresh))
        rises.append(drift.rise(drift.watched(DriftState(), new.tolist(), *drift.known(usual), 1)))
    assert rises[0] < drift.ALARM <= rises[1]


def test_the_past_of_a_file_is_read_or_refused_by_its_line(embedding: Path, classifier: Path, tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_text("q\tp\nq2\tp2\tn\n")
    bad.write_text("q\tp\nonly one column\n")
    task = opened(embedding, "embedding")
    assert [one.passages for one in task.past(good)[0]] == [("q", "p", ""), ("q2", "p2", "n")]
    with pytest.raises(InputError, match="different line 2"):
        task.past(bad)
    task = opened(classifier, "classification")
    good.write_text("0\ta text\n2\tanother\n")
    assert [one.passages for one in task.past(good)[0]] == [("0", "a text"), ("2", "another")]
    with pytest.raises(InputError, match="labels in"):
        task.past(bad)
    with pytest.raises(InputError, match=r"online\.old_texts"):
        task.past(None)


def test_rows_of_another_task_are_refused(version: Version, tmp_path: Path) -> None:
    folder, task, learnt, held_out = version
    for wrong in (learnt[:, :-1], learnt + 400, np.full_like(learnt, -1)):
        with pytest.raises(InputError, match="rows new"):
            update_version(task, folder, "two", wrong, held_out, tmp_path / "2", RECIPE)
    assert list(tmp_path.iterdir()) == []


def test_a_fall_is_bounded_and_refused_by_name() -> None:
    vectors = np.eye(40, dtype=np.float32)
    turned = np.roll(vectors, 1, axis=1)
    near = (0.98 * vectors + 0.2 * turned) / np.sqrt(0.98**2 + 0.2**2)
    for after, passes in ((vectors, True), (near, True), (turned, False)):
        found = change_of("x", Scores(np.ones(40), vectors=vectors), Scores(np.ones(40), vectors=after))
        assert GateBudget().holds(found.high, found.fall) is passes
    right, half = np.ones(40), np.tile([0.0, 1.0], 20)
    found = change_of("x", Scores(right, {"accuracy": right}, ("accuracy",)), Scores(right, {"accuracy": half}))
    assert (found.shares[0].before, found.shares[0].after, found.fall > 0.5) == (1.0, 0.5, True)
    found = change_of("x", Scores(right, {"found first": right}), Scores(right, {"found first": half}))
    assert found.fall == 0  # it is told, and bounds nothing


def test_another_way_to_make_vectors_is_another_architecture(embedding: Path, tmp_path: Path) -> None:
    shutil.copytree(embedding, tmp_path / "2")
    (tmp_path / "2" / "1_Pooling").mkdir()
    (tmp_path / "2" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    rows = load_memory(embedding).held_out["one"]
    verdict = judge_candidate(
        opened(embedding, "embedding"), embedding, tmp_path / "2", ("two", rows), {}, GateBudget()
    )
    assert [item.name for item in verdict.objections] == [GateRefusal.ARCHITECTURE]
    assert "1_Pooling/config.json" in verdict.objections[0].why


def test_weights_saved_with_a_head_keep_their_names_and_the_head(tmp_path: Path) -> None:
    """A checkpoint of a masked language model is an embedding model too, whose file has other names than the model."""
    folder = save_tiny(tmp_path / "raw", "bert")
    file = folder / "model.safetensors"
    tensors = {f"bert.{name}": value for name, value in load_file(file).items() if not name.startswith("pooler.")}
    tensors["cls.predictions.bias"] = np.arange(400, dtype=np.float32)
    save_file(tensors, file, metadata={"format": "pt"})
    task = opened(folder, "embedding")
    held_out, old = rows_of(task, pairs("open", 60, 2)), rows_of(task, pairs("open", 60, 1))
    save_memory(Memory(Reservoir.empty(task.width)).with_domain("one", held_out), folder)
    recipe = RECIPE.model_copy(update={"steps": 3})
    update_version(task, folder, "two", old, held_out, tmp_path / "2", recipe, budget=LOOSE)
    found = load_file(tmp_path / "2" / "model.safetensors")
    assert found.keys() == tensors.keys()
    np.testing.assert_array_equal(found["cls.predictions.bias"], tensors["cls.predictions.bias"])
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not np.array_equal(found[name], tensors[name])
    load_encoder(load_checkpoint(model_slice(tmp_path / "2", "embedding")))


def test_a_classifier_of_several_labels_a_text_is_refused(classifier: Path, tmp_path: Path) -> None:
    shutil.copytree(classifier, tmp_path / "2")
    file = tmp_path / "2" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"problem_type": "multi_label_classification"}))
    with pytest.raises(InputError, match="several labels"):
        opened(tmp_path / "2", "classification")


@pytest.mark.parametrize(
    ("task", "online", "says"),
    [
        ("reranking", {}, "not for model.task=reranking"),
        ("seq2seq", {}, "not for model.task=seq2seq"),
        ("classification", {"learner": {"window": 64, "temperature": 0.1}}, "temperature says nothing"),
        ("embedding", {"learner": {"window": 64, "min_rating": 0.5}}, "min_rating says nothing"),
        ("generation", {"learner": {"window": 64}, "gate": {"max_fall": 0.1}}, "max_fall says nothing"),
        ("embedding", {"learner": {"window": 128}}, "over model.max_length=64"),
        ("embedding", {"learner": {"window": 64, "rows": 1}}, "nothing to tell a pair from"),
        ("embedding", {"learner": {"window": 64, "temperature": 0.1}, "gate": {"max_fall": 0.1}}, ""),
    ],
)
def test_what_a_spec_asks_of_another_task_is_refused(task: str, online: dict[str, Any], says: str) -> None:
    encoder = task not in ("generation", "seq2seq")
    spec = {"name": "a", "model": {"source": "./a", "task": task, "max_length": 64}, "online": online}
    if encoder:
        spec["serving"] = {"length_buckets": [16, 64]}
    if says:
        with pytest.raises(ValueError, match=says):
            DeploymentSpec.model_validate(spec)
    else:
        DeploymentSpec.model_validate(spec)


def test_tasks_open_by_the_specs_word(embedding: Path, classifier: Path) -> None:
    assert isinstance(opened(embedding, "embedding"), EmbeddingTask)
    assert isinstance(opened(classifier, "classification"), ClassifierTask)
