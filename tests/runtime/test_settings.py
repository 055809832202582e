"""Settings are UTF-8 whatever the locale: Triton's stubs run in C's, and chat templates hold any character."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from runtime.settings import ServedModel, TokenizerModelSettings, TokenizerSettings
from tests import ROOT

_READ = (
    "import sys; from pathlib import Path; from runtime.settings import TokenizerModelSettings as T; "
    "found = T.load(Path(sys.argv[1])); found.save(Path(sys.argv[1])); print(ascii(found.tokenizer.prompts['q']))"
)


def test_settings_are_read_and_written_in_the_locale_of_a_stub(tmp_path: Path) -> None:
    served = ServedModel(ensemble="m", version=1, precision="fp32", model_digest="", spec_digest="")
    tokenizer = TokenizerSettings(max_length=8, pad_id=0, token_type_ids=False, pair=False, prompts={"q": "质问世ü: "})
    settings = TokenizerModelSettings(tokenizer=tokenizer, served=served)
    settings.save(tmp_path)
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _READ, str(tmp_path)]
    said = subprocess.run(command, env=plain, check=True, capture_output=True, text=True, timeout=120)
    assert said.stdout.strip() == ascii("质问世ü: ")
    assert TokenizerModelSettings.load(tmp_path) == settings
