"""Language models made smaller: against direct computations, and from a spec to the ranks that serve them."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from builders import pipeline
from builders.artifacts import Checkpoint, GenerationQuality
from builders.checkpoint.widths import FILE, layers_of, widths_of_model
from builders.commands.compressing import compress as command
from builders.compress import importance, prune
from builders.compress.losses import soft_labels
from builders.compress.saving import save
from builders.compress.step import carry_out
from builders.compress.texts import CalibrationText
from builders.errors import QualityError, SpecError, UnsupportedError
from builders.export.weights import load_weights
from builders.pipeline.compress import planned
from builders.pipeline.opened import opened
from builders.spec import DeploymentSpec, StepSlice
from tests.compress.tiny import BUDGET
from tests.generators import POSITIONS, eager_logits, generator_checkpoint, save_generator

HEAD, GROUP = 8, 4  # of the tiny Llama: 8 heads of 8, four of which share keys and values
IDS = [5, 9, 200, 31, 7, 8, 120]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_generator(tmp_path_factory.mktemp("smaller") / "llama", "llama")


def _spec(source: Path, steps: list[dict[str, Any]], **more: Any) -> DeploymentSpec:
    budget = more.pop("budget", {"max_perplexity_ratio": 1e9} if steps else None)
    model = {"source": str(source), "task": "generation", "max_length": POSITIONS}
    precision = {"cpu": "fp32", "calibration_samples": 32}
    return DeploymentSpec.model_validate(
        {"name": "small", "model": model, "compress": steps, "budget": budget, "precision": precision, **more}
    )


def _carry_out(checkpoint: Checkpoint, model: Any, step: dict[str, Any], tensor: int = 1) -> list[str]:
    asked = StepSlice.model_validate(step)
    return carry_out(asked, model, opened(checkpoint)[1], checkpoint, CalibrationText(checkpoint, BUDGET), tensor)


def test_a_pruned_model_is_the_whole_one_with_the_rest_masked(llama: Path) -> None:
    """By groups of heads that share keys and values, and by neurons, with their gates."""
    model = load_weights(generator_checkpoint(llama))
    masked = copy.deepcopy(model)
    heads, ffn = [np.array([1]), np.array([0])], [np.arange(0, 96, 2), np.arange(8, 24)]
    with torch.no_grad():
        for number, layer in enumerate(layers_of(masked)):
            lost = 1 - heads[number][0]
            layer.self_attn.o_proj.weight[:, lost * GROUP * HEAD : (lost + 1) * GROUP * HEAD] = 0
            layer.mlp.down_proj.weight[:, sorted(set(range(96)) - set(ffn[number].tolist()))] = 0
    prune.keep(model, heads, ffn)
    assert [(layer.heads, layer.ffn) for layer in widths_of_model(model).layers] == [(4, 48), (4, 16)]
    assert (model.config.num_attention_heads, model.config.num_key_value_heads, model.config.head_dim) == (4, 1, 8)
    wanted = eager_logits(masked, input_ids=IDS)
    assert np.abs(eager_logits(model, input_ids=IDS) - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_fisher_is_the_squared_slope_of_the_likelihood(llama: Path) -> None:
    """Of one token after another token, against every next token by its probability."""
    checkpoint = generator_checkpoint(llama)
    model, as_forward = opened(checkpoint)
    forward = as_forward(model)
    batch = {"input_ids": torch.tensor([[17]]), "attention_mask": torch.ones(1, 1, dtype=torch.int64)}
    down = layers_of(model)[0].mlp.down_proj
    mask = torch.ones(96, requires_grad=True)
    hook = down.register_forward_pre_hook(lambda _, given: (given[0] * mask,))
    every = torch.log_softmax(forward(**batch)[0, 0], dim=-1)
    slopes = torch.stack([torch.autograd.grad(each, mask, retain_graph=True)[0] for each in every])
    hook.remove()
    wanted = (every.exp()[:, None] * slopes.square()).sum(0).detach().numpy()
    found = sum(importance.fisher(model, forward, [batch] * 100, seed).ffn[0] for seed in range(3)) / 600
    assert np.corrcoef(found, wanted)[0, 1] > 0.9
    assert 0.7 < found.sum() / wanted.sum() < 1.4


def test_what_is_saved_is_what_loads(llama: Path, tmp_path: Path) -> None:
    """Uneven neurons and thin products need a manifest; a head that is tied to the table stays so."""
    checkpoint = generator_checkpoint(llama)
    model = load_weights(checkpoint)
    _carry_out(checkpoint, model, {"prune": {"what": ["ffn"], "amount": 0.4, "tokens": 500}})
    _carry_out(checkpoint, model, {"low_rank": {"parts": "all", "rank": 8, "tokens": 500}})
    step = StepSlice.model_validate({"low_rank": {"rank": 8}})
    saved = save(model, checkpoint, _spec(llama, []).model, step, [], tmp_path)
    assert (tmp_path / FILE).is_file()
    assert saved.parameters < checkpoint.parameters
    again = load_weights(saved)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert np.array_equal(eager_logits(again, input_ids=IDS), eager_logits(model, input_ids=IDS))


def test_even_widths_are_said_in_config_json_and_transformers_loads_them(llama: Path, tmp_path: Path) -> None:
    import transformers

    checkpoint = generator_checkpoint(llama)
    model = load_weights(checkpoint)
    asked = {"heads": 4, "ffn": 48, "keep_layers": [1], "importance": "magnitude", "ranking": "uniform"}
    notes = _carry_out(checkpoint, model, {"prune": {"what": ["layers", "heads", "ffn"], **asked}})
    assert notes == ["layers 2 -> 1; heads 8 -> 4; ffn 96 -> 48"]
    step = StepSlice.model_validate({"prune": {"amount": 0.5}})
    saved = save(model, checkpoint, _spec(llama, []).model, step, [], tmp_path)
    assert not (tmp_path / FILE).exists()
    assert saved.generation is not None
    assert (saved.generation.layers, saved.generation.heads, saved.generation.kv_heads) == (1, 4, 1)
    alone = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert np.abs(eager_logits(alone, input_ids=IDS) - eager_logits(model, input_ids=IDS)).max() < 1e-5


STEPS: list[dict[str, Any]] = [
    {"prune": {"what": ["ffn"], "amount": 0.3, "tokens": 500}},
    {"distil": {"tokens": 4000, "text_tokens": 2000, "batch_tokens": 512, "optimiser": "adamw"}},
]


def test_the_whole_way_with_ranks(llama: Path, tmp_path: Path) -> None:
    """Spec, pruned and trained checkpoint, graph, two ranks, and the repository with its proof."""
    spec = _spec(llama, STEPS, parallel={"tensor": 2})
    said: list[str] = []
    built = pipeline.build(spec, "cpu", tmp_path, "repository", lambda stage, text: said.append(text))
    assert built.entry is not None
    assert built.partition is not None
    assert built.partition.tensor == 2
    widths = json.loads(built.checkpoint.path(FILE).read_text())
    assert all(layer["ffn"] % 16 == 0 for layer in widths["layers"])
    assert isinstance(built.graph("fp32").quality, GenerationQuality)
    line = next(text for text in said if text.startswith("step 1: distil:"))
    before, after = (float(word) for word in line.split("did not see ")[1].split(",")[0].split(" -> "))
    assert after < before


@pytest.mark.slow
def test_a_new_process_exports_shards_and_verifies_it(llama: Path, tmp_path: Path) -> None:
    checkpoint = generator_checkpoint(llama)
    model = load_weights(checkpoint)
    _carry_out(checkpoint, model, STEPS[0], tensor=2)
    (tmp_path / "smaller").mkdir()
    save(model, checkpoint, _spec(llama, []).model, StepSlice.model_validate(STEPS[0]), [], tmp_path / "smaller")

    def trireme(*arguments: str) -> str:
        command = [sys.executable, "-m", "builders", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout

    graph = str(tmp_path / "g.onnx")
    trireme("export", str(tmp_path / "smaller"), "-o", graph, "--task", "generation", "--max-length", "64")
    trireme("shard", graph, "-o", str(tmp_path / "parts"), "--tensor-parallel", "2")
    assert trireme("verify", str(tmp_path / "parts"), "--against", graph).startswith("equal: 2 rank processes")


def test_a_recipe_beside_what_is_free_and_over_its_budget(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = _spec(llama, STEPS[:1], budget={"max_perplexity_ratio": 1.0, "min_agreement": 0.999})
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
    with pytest.raises(QualityError) as caught:
        command(str(file), tmp_path, as_json=True)
    assert "budget.min_agreement is 0.999, and 0." in str(caught.value)
    assert "step 0 (prune) is at fault" in str(caught.value)
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["rows"]] == ["original", "0 prune", "truncate to layers 0"]
    assert found["rows"][0]["perplexity_ratio"] == 1
    assert 0 < found["rows"][1]["agreement"] < 1
    with pytest.raises(QualityError, match="min_agreement"):
        pipeline.build(spec, "cpu", tmp_path, "compress")
    with pytest.raises(QualityError):
        command(str(file), tmp_path, as_json=False)
    assert "0 prune against original: perplexity" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"prune": {"amount": 0.5}}, "0.prune.ranking: got global with heads; expected uniform"),
        ({"prune": {"what": ["heads"], "heads": 6, "ranking": "uniform"}}, "a multiple of 4 (parallel.tensor x 4"),
        ({"prune": {"what": ["ffn"], "amount": 0.5, "refit": "least_squares"}}, "0.prune.refit: got least_squares"),
        (
            {"distil": {"tokens": 9, "losses": {"embedding_cosine": 1.0}}},
            "distil.losses.embedding_cosine: got a model",
        ),
        (
            {"distil": {"tokens": 9, "losses": {"attention": 1.0}}},
            "distil.losses.attention: got a model for generation",
        ),
        ({"distil": {"tokens": 9, "student_layers": [0, 2]}}, "a student has no more layers than its teacher"),
    ],
)
def test_what_is_not_built_is_refused_by_name(llama: Path, tmp_path: Path, step: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as caught:
        pipeline.build(_spec(llama, [step]), "cpu", tmp_path, "compress")
    assert said in str(caught.value)


def test_other_families_and_keys_of_other_tasks(tmp_path: Path) -> None:
    gpt2 = save_generator(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UnsupportedError, match=r"got model type gpt2; expected one of bert, roberta, .*llama"):
        pipeline.build(_spec(gpt2, STEPS), "cpu", tmp_path, "compress")
    with pytest.raises(ValueError, match=r"budget\.min_mean_cosine says nothing to model\.task=generation"):
        _spec(gpt2, STEPS, budget={"min_mean_cosine": 0.5})
    with pytest.raises(ValueError, match=r"budget\.min_agreement says nothing to model\.task=embedding"):
        _spec(gpt2, STEPS, budget={"min_agreement": 0.5}, model={"source": "x", "task": "embedding"})
    with pytest.raises(ValueError, match="not for seq2seq"):
        _spec(gpt2, STEPS, model={"source": "x", "task": "seq2seq"})


def test_a_plan_knows_what_stays(llama: Path) -> None:
    steps = [{"prune": {"what": ["heads", "layers"], "heads": 4, "keep_layers": [0], "ranking": "uniform"}}]
    sizes, left = planned(_spec(llama, steps), json.loads((llama / "config.json").read_text()))
    assert sizes == {"layers": 1, "heads": 4, "kv_heads": 1, "head_dim": 8, "ffn": 96, "hidden": 64}
    assert left == []


def test_next_token_probabilities_at_a_temperature() -> None:
    student, teacher = torch.randn(7, 11), torch.randn(7, 11)
    wanted = torch.nn.functional.kl_div(
        torch.log_softmax(student / 3, 1), torch.log_softmax(teacher / 3, 1), log_target=True, reduction="batchmean"
    )  # fmt: skip
    assert torch.allclose(soft_labels(student, teacher, 3.0), 9 * wanted, atol=1e-5)
