"""Compiled layers compute what the others do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_encoder
from enc2gen import DecodingConfig, SwcmForConditionalGeneration
from enc2gen.errors import ConfigError
from enc2gen.generation.engine import engine as engines
from enc2gen.generation.engine import linear
from enc2gen.generation.engine.beam import Hypothesis
from enc2gen.generation.engine.engine import Engine, beam_settings, compiles
from enc2gen.models import compilation
from enc2gen.models.compilation import check_compiler, compile_layers
from enc2gen.training import Trainer
from test_engine import grown, sources
from training_toys import ToySeq2Seq, ToyStream, config, validation

CPU = torch.device("cpu")


def has_compiler() -> bool:
    """Whether this machine has what torch.compile needs."""
    try:
        check_compiler(CPU, where="test")
    except ConfigError:
        return False
    return True


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """torch.compile with everything but its code generation, which needs a compiler and time; the graphs made."""
    graphs: list[Any] = []
    compile_with = torch.compile

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_with(function, backend=backend, **given))
    return graphs


def tokens(found: list[list[Hypothesis]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(hypothesis.tokens) for hypothesis in row] for row in found]


@pytest.mark.parametrize("kind", ["xlm-roberta", "modernbert"])  # with rotary positions and windows, too
def test_compiled_decoding_writes_the_same_with_few_graphs(
    kind: str, traced: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many layers, steps and sources: a graph for each kind of layer and of cache."""
    monkeypatch.setattr(linear.torch.backends.mkldnn, "is_available", lambda: False)  # as on a GPU
    model, (ids, mask) = grown(kind, end=0.5, layers=8), sources(6)
    settings, starts = beam_settings(model, DecodingConfig(max_new_tokens=40), 60), torch.full((6,), 5)
    plain, engine = Engine(model, "fp32"), Engine(model, "fp32", compiles=True)
    for rows in (6, 3):
        batch = ids[:rows], mask[:rows], starts[:rows], settings
        assert tokens(engine.search(*batch)) == tokens(plain.search(*batch))
    kinds = {(type(layer), layer.sliding_window) for layer in model.decoder.layers}
    assert 0 < len(traced) <= 5 * len(kinds)


def test_compiled_decoding_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = DecodingConfig(compile=True)
    with pytest.raises(ConfigError, match="for GPUs"):
        compiles(asked, CPU)
    checked: list[torch.device] = []
    monkeypatch.setattr(engines, "check_compiler", lambda device, **_: checked.append(device))
    assert compiles(asked, torch.device("cuda")) and checked == [torch.device("cuda")]
    assert not compiles(DecodingConfig(), CPU)
    with pytest.raises(ConfigError, match="compile"):
        asked.arguments()  # of transformers' generate


def test_no_compiler_is_said_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("Failed to find C++ compiler.\nmore")

    compilation._compiles_on.cache_clear()  # the processor has had its compiler found by now
    monkeypatch.setattr(compilation.torch, "compile", missing)
    with pytest.raises(ConfigError, match=r"(?s)training\.compile.*C\+\+ compiler.*g\+\+") as error:
        compile_layers(tiny_encoder(), CPU, where="training.compile")
    assert "more" not in str(error.value)
    with pytest.raises(ConfigError, match="ToySeq2Seq has no layers to compile"):
        Trainer(ToySeq2Seq(), ToyStream(), validation(), config(compile=True), tmp_path).train()


@pytest.mark.skipif(not has_compiler(), reason="torch.compile needs a C++ compiler")
def test_compiled_layers_have_the_gradients_of_the_others() -> None:
    """With the real compiler: dropout 0, a whole model, and the way back."""
    model = SwcmForConditionalGeneration.from_encoder(
        tiny_encoder("bert"), insert_every=None, dropout=0.0, verbose=False
    ).train()
    names = [name for name, _ in model.named_parameters()]
    ids, labels = torch.randint(6, 60, (2, 5)), torch.randint(6, 60, (2, 4))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        model(input_ids=ids, decoder_input_ids=labels, labels=labels).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    plain = gradients()
    undo = compile_layers(model, CPU, where="test")
    called = [module for module in model.modules() if module._compiled_call_impl is not None]
    assert len(called) == 2 * len(model.decoder.layers)
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    undo()
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_training_compiles_and_gives_the_model_back(tmp_path: Path, traced: list[Any]) -> None:
    """Same losses with dropout, which stays outside what is compiled; the trained model is not compiled."""
    found = []
    for on in (False, True):
        model = SwcmForConditionalGeneration.from_encoder(tiny_encoder(), dropout=0.2, verbose=False)
        settings = config(max_steps=3, warmup=0, eval_every=3, compile=on)
        found.append(Trainer(model, ToyStream(), validation(), settings, tmp_path / str(on)).train().best_loss)
        assert bool(traced) == on
        assert all(module._compiled_call_impl is None for module in model.modules())
    assert found[0] == pytest.approx(found[1], rel=1e-5)
