"""The decoders of the proof: torch's step reads the whole cache, and a graph that was left half-way is made again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builders.export import decoder
from measure.gpu_proof import decoder_engines, setting
from measure.gpu_proof.decoders import decode_step, new_llama

CONTEXT = 12


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_stands_at_the_end_of_a_full_cache_however_often_it_is_made(tmp_path: Path, compiled: bool) -> None:
    import torch
    from transformers import DynamicCache

    tiny = setting.dry(tmp_path)
    model = new_llama(tiny.decoder, CONTEXT, tiny.dtype, tiny.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the usual 0.02 would make every token as likely as the next
                parameter.mul_(20)
    step = decode_step(tiny, model, 2, CONTEXT, compiled=compiled)
    found = [step().flatten().tolist() for _ in range(CONTEXT)]
    tokens = {}
    for length in (0, CONTEXT - 1):
        cache = DynamicCache()
        for layer in range(tiny.decoder.layers):
            nothing = torch.zeros(1, tiny.decoder.kv_heads, length, tiny.decoder.head_dim)
            cache.update(nothing, nothing, layer)
        with torch.no_grad():
            logits = model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache).logits
        tokens[length] = int(logits.argmax())
    assert tokens[0] != tokens[CONTEXT - 1]  # it shows whether all of the cache was seen
    assert found == [[tokens[CONTEXT - 1]] * 2] * CONTEXT


def test_random_weights_are_the_same_twice(tmp_path: Path) -> None:
    tiny = setting.dry(tmp_path)
    first, second = (new_llama(tiny.decoder, 16, tiny.dtype, tiny.device).state_dict() for _ in range(2))
    assert all((first[name] == second[name]).all() for name in first)


def test_a_graph_that_was_left_half_way_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A section may be ended while it exports, and the other flavour's asks for the same graph."""
    small = setting.dry(tmp_path)
    shape = replace(small.decoder, layers=1)
    write = decoder.write_graph

    def end_after(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decoder, "write_graph", end_after)
        with pytest.raises(KeyboardInterrupt):
            decoder_engines.decoder_graph(shape, small)
    assert not list(tmp_path.iterdir())
    first, _ = decoder_engines.decoder_graph(shape, small)
    again, _ = decoder_engines.decoder_graph(shape, small)
    assert first.file_path.is_file()
    assert first == again
