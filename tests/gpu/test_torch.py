"""The decoder in torch on the GPU: CUDA graphs and compiled steps change no token."""

from __future__ import annotations

import pytest

from measure.gpu_proof.decoders import decode_step, new_llama
from measure.gpu_proof.machine import require_torch
from measure.gpu_proof.setting import Setting
from measure.gpu_proof.timing import NotRun, captured


@pytest.mark.parametrize("compiled", [False, True])
def test_a_captured_step_gives_the_tokens_of_plain_calls(tiny: Setting, compiled: bool) -> None:
    try:
        require_torch(tiny, "transformers")
    except NotRun as refused:
        pytest.skip(str(refused))
    model = new_llama(tiny.decoder, 64, tiny.dtype, tiny.device)
    expected = decode_step(tiny, model, 4, 64)().tolist()
    launch = captured(decode_step(tiny, model, 4, 64, compiled=compiled), tiny)
    for _ in range(3):  # it stays where it is, and does not run past the cache
        assert launch().tolist() == expected
