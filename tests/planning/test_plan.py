"""The arithmetic of `plan`, against numbers worked out by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from builders.commands.plan import plan as plan_command
from builders.errors import CheckError, InputError, UnsupportedError
from builders.partition.cut.shard import partition_graph
from builders.planning.gpus import GIGA, GPUS
from builders.planning.page import map_of_partition, page
from builders.planning.plan import ExpectedLoad, best, divides, plan, plan_stages, shortlist, step_seconds
from builders.planning.report import layout_rows, report_page, report_plan
from builders.planning.transformer import Model, model_from_config
from builders.spec import load_spec
from measure.bench.decoder_graph import DecoderShape, write_decoder

GOLDEN = Path(__file__).parent / "golden" / "plan-minilm.json"

LLAMA_8B = Model(layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, ffn=14336, vocabulary=128256)
LLAMA_70B = Model(layers=80, hidden=8192, heads=64, kv_heads=8, head_dim=128, ffn=28672, vocabulary=128256)
CHAT = ExpectedLoad(sequences=16, prompt_tokens=1024, output_tokens=256)


def test_parameters_are_those_of_the_published_models() -> None:
    assert LLAMA_8B.parameters / 1e9 == pytest.approx(8.03, abs=0.01)
    assert LLAMA_70B.parameters / 1e9 == pytest.approx(70.55, abs=0.05)


def weight_bytes(model: Model, tensor: int, pipeline: int) -> int:
    return max(stage.weight_bytes for stage in plan_stages(model, tensor, pipeline))


def test_sizes_by_hand() -> None:
    def cache(tensor: int, pipeline: int) -> list[int]:
        return [stage.cache_bytes_per_token for stage in plan_stages(LLAMA_8B, tensor, pipeline)]

    assert cache(1, 1) == [131072]  # 2 x 32 layers x 8 heads x 128 x 2 bytes
    assert sum(cache(4, 2)) == 131072 // 4
    assert cache(16, 1) == [2 * 32 * 128 * 2]  # one head each, held twice over
    assert weight_bytes(LLAMA_8B, 1, 1) == LLAMA_8B.parameters * 2
    assert weight_bytes(LLAMA_8B.model_copy(update={"tied": True}), 1, 1) == (LLAMA_8B.parameters - 128256 * 4096) * 2
    assert plan_stages(LLAMA_8B, 1, 1)[0].collective_bytes_per_token == 0
    alone = plan_stages(LLAMA_8B, 2, 1)[0]
    assert alone.collective_bytes_per_token == 2 * 32 * 4096 * 2 + 128256 * 2 // 2
    assert alone.collectives == 65
    first, last = plan_stages(LLAMA_8B, 1, 2)
    assert (first.collectives, first.collective_bytes_per_token) == (1, 4096 * 2)  # the hand-over
    assert (first.layers + last.layers, first.head, last.head) == (32, False, True)


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (1, 3)])
def test_the_plan_is_what_the_partitioner_does(tensor: int, pipeline: int, tmp_path: Path) -> None:
    shape = DecoderShape(layers=6, hidden=128, heads=8, kv_heads=4, ffn=512, vocabulary=512)
    write_decoder(shape, tmp_path / "m.onnx")
    partition = partition_graph(tmp_path / "m.onnx", tensor, pipeline, tmp_path / "out")
    model = Model(layers=6, hidden=128, heads=8, kv_heads=4, head_dim=16, ffn=512, vocabulary=512,
                  weight_bits=32, value_bytes=4)  # fmt: skip
    planned = plan_stages(model, tensor, pipeline)
    written = [stage.rank_bytes for stage in partition.stages]
    assert sum(stage.weight_bytes for stage in planned) == pytest.approx(sum(written), rel=0.02)  # norms
    # The partitioner cuts between the two parts of a block too, the plan between blocks only.
    assert max(stage.weight_bytes for stage in planned) == pytest.approx(
        max(written), rel=0.1 if pipeline > 1 else 0.02
    )
    made = sum(stage.collectives for stage in planned) - (pipeline - 1)
    assert made == sum(len(stage.collectives) for stage in partition.stages)
    if pipeline == 1:
        assert planned[0].collective_bytes_per_token == partition.bytes_per_token


def test_layouts_obey_the_heads() -> None:
    assert divides(LLAMA_8B, 8)
    assert divides(LLAMA_8B, 16)
    assert not divides(LLAMA_8B.model_copy(update={"heads": 12, "kv_heads": 12}), 8)
    assert {each.tensor for each in plan(LLAMA_8B, GPUS["H100"], CHAT)} == {1, 2, 4, 8}


def test_70b_fits_two_h200_and_no_single_h100() -> None:
    one = plan(LLAMA_70B, GPUS["H100"], CHAT, max_gpus=1)
    assert "needs 1" in one[0].reasons[0]
    assert "room for 72.0" in one[0].reasons[0]
    chosen = best(plan(LLAMA_70B, GPUS["H200"], CHAT))
    assert chosen is not None
    assert (chosen.gpus, chosen.tensor) == (2, 2)
    assert best(plan(LLAMA_70B, GPUS["L4"], CHAT, max_gpus=4)) is None


def test_limits_are_given_as_reasons() -> None:
    limits = CHAT.model_copy(update={"max_between_tokens_ms": 0.1, "max_first_token_ms": 0.1, "min_tokens_per_s": 1e9})
    reasons = " ".join(plan(LLAMA_8B, GPUS["H100"], limits)[0].reasons)
    assert all(words in reasons for words in ("first token after", "ms between tokens", "tokens/s, wanted"))


def test_decoding_is_bound_by_memory_and_prefill_by_compute() -> None:
    gpu, stage = GPUS["H100"], plan_stages(LLAMA_8B, 1, 1)[0]
    seconds, bound = step_seconds(LLAMA_8B, gpu, 1, stage, 1, 1, 0)
    assert bound == "memory"
    read = (LLAMA_8B.parameters - LLAMA_8B.embedding_parameters) * 2  # all but the table of embeddings
    assert seconds == pytest.approx(read / (0.8 * 3350 * GIGA), rel=0.01)
    assert step_seconds(LLAMA_8B, gpu, 1, stage, 1, 4096, 0)[1] == "compute"


@given(sequences=st.integers(1, 64), prompt=st.integers(1, 4096), output=st.integers(1, 1024))
def test_more_load_never_takes_less(sequences: int, prompt: int, output: int) -> None:
    load = ExpectedLoad(sequences=sequences, prompt_tokens=prompt, output_tokens=output)
    before = {(each.tensor, each.pipeline): each for each in plan(LLAMA_8B, GPUS["H200"], load) if each.replicas == 1}
    for key in ("sequences", "prompt_tokens", "output_tokens"):
        more = load.model_copy(update={key: getattr(load, key) + 7})
        for each in plan(LLAMA_8B, GPUS["H200"], more):
            if each.replicas == 1:
                was = before[each.tensor, each.pipeline]
                assert each.total_bytes >= was.total_bytes
                assert each.first_token_ms >= was.first_token_ms
                assert each.between_tokens_ms >= was.between_tokens_ms


@given(tensor=st.sampled_from([1, 2, 4, 8]), pipeline=st.integers(1, 8))
def test_more_gpus_never_hold_more_each(tensor: int, pipeline: int) -> None:
    assert weight_bytes(LLAMA_70B, 2 * tensor, pipeline) <= weight_bytes(LLAMA_70B, tensor, pipeline)
    assert weight_bytes(LLAMA_70B, tensor, pipeline + 1) <= weight_bytes(LLAMA_70B, tensor, pipeline)
    assert weight_bytes(LLAMA_70B, tensor, pipeline) >= LLAMA_70B.parameters * 2 / (tensor * pipeline) * 0.9


def test_a_default_that_a_config_leaves_out_counts() -> None:
    """Llama's class has `silu` where config.json says nothing: a third of a block's weights."""
    config = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100,
    }  # fmt: skip
    assert model_from_config(config) == model_from_config({**config, "hidden_act": "silu"})
    assert not model_from_config({**config, "model_type": "gpt_neox"}).gated


def test_sizes_from_a_config() -> None:
    config = {"hidden_size": 384, "num_attention_heads": 12, "num_hidden_layers": 6, "intermediate_size": 1536,
              "vocab_size": 30522, "hidden_act": "gelu", "architectures": ["BertModel"]}  # fmt: skip
    model = model_from_config(config)
    assert (model.head_dim, model.gated, model.generates) == (32, False, False)
    assert plan_stages(model, 1, 1)[0].cache_bytes_per_token == 0
    encoder = best(plan(model, GPUS["L4"], ExpectedLoad(sequences=32, prompt_tokens=128)))
    assert encoder is not None
    assert encoder.gpus == 1
    with pytest.raises(InputError, match="vocab_size"):
        model_from_config({key: value for key, value in config.items() if key != "vocab_size"})


@pytest.mark.parametrize(
    ("key", "value", "error"),
    [
        ("num_local_experts", 8, UnsupportedError),
        ("is_encoder_decoder", True, UnsupportedError),
        ("hidden_size", 0, InputError),
        ("num_hidden_layers", "six", InputError),
    ],
)
def test_models_that_the_arithmetic_does_not_describe(key: str, value: object, error: type[Exception]) -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100, key: value}
    with pytest.raises(error, match=key if error is InputError else "config.json"):
        model_from_config(config)


def test_every_gpu_names_its_source() -> None:
    assert all(gpu.source.startswith("https://") and "NVIDIA" in gpu.document for gpu in GPUS.values())


def test_shortlist_has_one_line_a_layout_and_one_reason_each() -> None:
    limits = CHAT.model_copy(update={"max_between_tokens_ms": 30})
    found = report_plan("chat", LLAMA_70B, [GPUS["H100"]], limits, 8)
    rows = layout_rows(found)
    assert len(rows) == len({(each.tensor, each.pipeline) for each in plan(LLAMA_70B, GPUS["H100"], limits)}) == 15
    assert [row[-1] for row in rows].count("best: 4 GPUs") == 1
    assert sum("limit 30" in row[-1] for row in rows) == 6
    assert sum("room for 72.0" in row[-1] for row in rows) == 3
    assert all(row[-1] for row in rows)
    several = report_plan("chat", LLAMA_70B, list(GPUS.values()), CHAT, 8)
    assert [row[0] for row in layout_rows(several)] == list(GPUS)
    best_of_h100 = next(choice.best for choice in several.choices if choice.gpu.name == "H100")
    assert best_of_h100 in shortlist(plan(LLAMA_70B, GPUS["H100"], CHAT))


def svg_texts(document: str) -> list[str]:
    return [str(node.text) for node in ElementTree.fromstring(document).iter() if node.tag.endswith("}text")]


def test_page_is_xml_and_fetches_nothing(tmp_path: Path) -> None:
    found = report_plan("a <b> & c", LLAMA_70B, [GPUS["H100"], GPUS["L4"]], CHAT, 8)
    document = report_page(found)
    root = ElementTree.fromstring(document)
    names = {node.tag.rpartition("}")[2] for node in root.iter()}
    assert {"svg", "table", "style"} <= names
    assert not names & {"script", "link", "img", "image", "iframe"}
    assert not {"src", "href"} & {key.rpartition("}")[2] for node in root.iter() for key in node.attrib}
    assert "url(" not in document
    ranks = sum(choice.best.tensor * choice.best.pipeline for choice in found.choices if choice.best)
    assert sum(text.startswith("rank ") for text in svg_texts(document)) == ranks == 3 + 8


def test_a_real_partition_is_drawn_by_the_same_hand(tmp_path: Path) -> None:
    shape = DecoderShape(layers=2, hidden=64, heads=4, kv_heads=2, ffn=128, vocabulary=256)
    write_decoder(shape, tmp_path / "m.onnx")
    partition = partition_graph(tmp_path / "m.onnx", 2, 2, tmp_path / "out")
    texts = svg_texts(page("partition", (), [map_of_partition(partition)]))
    assert texts.count("rank 1") == 2
    assert any(text.startswith("2 all-reduce, 1 all-gather") for text in texts)


def test_command_prints_the_golden_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Written by `trireme plan minilm` with these options and `--json`."""
    plan_command("minilm", gpu=["L4", "h100"], max_gpus=2, sequences=32, prompt_tokens=128, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(GOLDEN.read_text())


def test_command_plans_for_what_compress_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pruned widths are counted; what is known only when it is made is said to be left out."""
    spec = load_spec("minilm").model_dump(mode="json", exclude_defaults=True)
    steps = [
        {"prune": {"what": ["layers"], "keep_layers": [0, 2, 5]}},
        {"prune": {"heads": 8, "ffn": 768}},
        {"low_rank": {"rank": 64}},
    ]
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump({**spec, "compress": steps}))
    plan_command(str(file), gpu=["L4"], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert {key: found["model"][key] for key in ("layers", "heads", "head_dim", "ffn")} == {
        "layers": 3, "heads": 8, "head_dim": 32, "ffn": 768,
    }  # fmt: skip
    assert found["not_counted"] == ["low_rank"]
    plan_command(str(file), gpu=["L4"])
    assert "without what low_rank of compress saves" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: plan_command("minilm", gpu=["T4"]), InputError, "expected L4, A10G"),
        (lambda: plan_command("minilm", output_tokens=5), InputError, "this model is an encoder"),
        (lambda: plan_command("minilm", output=Path("plan.pdf")), InputError, "ends in .html"),
        (lambda: plan_command("minilm", max_first_token_ms=1e-6), CheckError, "limit 1e-06"),
    ],
)
def test_command_refuses(call: Callable[[], None], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
