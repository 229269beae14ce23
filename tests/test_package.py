"""What `import enc2gen` loads, and what it promises to those who import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from enc2gen.errors import ConfigError
from enc2gen.registry import Registry


def run(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_import_registers_the_model_with_transformers() -> None:
    code = (
        "import enc2gen; from transformers import AutoConfig, AutoModelForSeq2SeqLM as M;"
        "config = AutoConfig.for_model('enc2gen-swcm'); print(M._model_mapping[type(config)].__name__)"
    )
    environment = {name: value for name, value in os.environ.items() if name != "ENC2GEN_COMMAND"}
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.strip() == (
        "SwcmForConditionalGeneration"
    )


def test_the_command_and_its_workers_clean_text_without_torch() -> None:
    imports = "import sys, enc2gen.cli.main, enc2gen.corpora.pipeline"
    code = f"{imports}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert run(code, ENC2GEN_COMMAND="1") == "False False"


def test_public_names_are_there_in_either_case() -> None:
    code = "import enc2gen; print(all(getattr(enc2gen, name) is not None for name in enc2gen.__all__))"
    assert run(code, ENC2GEN_COMMAND="1") == "True"


def test_the_command_knows_the_model_all_the_same() -> None:
    for module in ("enc2gen.generation.generator", "enc2gen.models.surgery", "enc2gen.experiments.systems"):
        model_type = "AutoConfig.for_model('enc2gen-swcm').model_type"
        code = f"import {module}; from transformers import AutoConfig; print({model_type})"
        assert run(code, ENC2GEN_COMMAND="1") == "enc2gen-swcm"


def test_a_lazy_entry_may_be_registered_again_after_its_first_use() -> None:
    registry: Registry[object] = Registry("thing")
    registry.add("loads", "json:loads")
    assert registry.get("loads") is json.loads
    registry.add("loads", "json:loads")
    with pytest.raises(ConfigError, match="registered twice"):
        registry.add("loads", "json:dumps")
    with pytest.raises(ConfigError, match="registered twice"):
        registry.add("loads", "json:dumps")
