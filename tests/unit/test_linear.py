"""Linear layers with few rows: who computes them and when, and that a model is otherwise as it was.

Legend: B, T leading dims of x, M its rows, X any leading dims, N outputs, K inputs.
"""

import copy
import io
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvkeep.config import CacheOptions, EngineSettings, SamplingParams
from kvkeep.engine import Engine
from kvkeep.hf import linear, linear_trial
from kvkeep.hf.hooks import installed, running
from kvkeep.hf.install import install
from kvkeep.hf.linear import (
    LinearChoice,
    LinearTrials,
    PagedLinear,
    install_linears,
    uninstall_linears,
)
from kvkeep.hf.linear_trial import try_layers
from kvkeep.hf.paged_model import Mode
from kvkeep.native import Kernels, KernelsAbsent, load_kernels
from kvkeep.testing.oracle import logits_at_all_positions
from kvkeep.testing.tiny_models import build_tiny


def random_rows(num_rows: int, num_inputs: int) -> Tensor:
    """The first rows of always the same ones."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(20, num_inputs, generator=generator)[:num_rows].bfloat16()


class Recorder:
    """Computes as torch does, and remembers of how many rows; like a library it cannot be copied."""

    def __init__(self) -> None:
        self.num_rows: list[int] = []

    def __reduce__(self) -> str:
        raise TypeError("a library cannot be copied")

    def linear(
        self, weight_NK: Tensor, bias_N: Tensor | None, x_XK: Tensor, out_XN: Tensor
    ) -> None:
        assert x_XK.is_contiguous()
        assert out_XN.is_contiguous()
        self.num_rows.append(x_XK.shape[:-1].numel())
        out_XN.copy_(F.linear(x_XK, weight_NK, bias_N))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """Kernels that pass every trial for up to 4 rows."""

    def passed(_kernels: object, layers: list[nn.Linear]) -> LinearChoice:
        return verdict(layers, most_rows=4)

    monkeypatch.setattr(linear, "try_layers", passed)
    return Recorder()


def verdict(layers: list[nn.Linear], *, most_rows: int) -> LinearChoice:
    """What a trial says of kernels that are right."""
    return LinearChoice(
        num_outputs=layers[0].out_features,
        num_inputs=layers[0].in_features,
        has_bias=layers[0].bias is not None,
        num_layers=len(layers),
        most_rows=most_rows,
        error=0.0,
        torch_error=0.0,
        speed_up=2.0,
    )


class NoAttention:
    """A step in which nothing attends."""

    def attend(self, *_arguments: Any) -> Tensor:
        raise NotImplementedError


def step() -> AbstractContextManager[None]:
    """A step of kvkeep is running."""
    return installed([], NoAttention())


def small_model() -> nn.Sequential:
    """Three layers of two shapes, in bf16."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.Linear(64, 48), nn.Linear(48, 64)).bfloat16()


@torch.no_grad()
def test_few_rows_go_to_the_kernel_while_a_step_runs(recorder: Recorder) -> None:
    """Leading dims count together; more rows than were found to pay, and all other times, are torch's."""
    model, x_BTK = small_model(), random_rows(5, 48).view(1, 5, 48)
    expected_BTN = model(x_BTK)
    choices = install_linears(model, recorder, {})

    assert [(c.num_outputs, c.num_inputs, c.num_layers) for c in choices] == [
        (64, 48, 2),
        (48, 64, 1),
    ]
    assert torch.equal(model(x_BTK[:, :4]), expected_BTN[:, :4])
    assert recorder.num_rows == []
    with running():
        assert torch.equal(model(x_BTK[:, :4]), expected_BTN[:, :4])
    assert recorder.num_rows == [4, 4, 4]
    recorder.num_rows.clear()
    with step():
        assert torch.equal(model(x_BTK[:, :4].view(2, 2, 48)), expected_BTN[:, :4].view(2, 2, 64))
        assert recorder.num_rows == [4, 4, 4]
        assert torch.equal(model(x_BTK), expected_BTN)
        assert torch.equal(model(x_BTK[0, 0]), expected_BTN[0, 0])
        assert model(x_BTK[:, :0]).shape == (1, 0, 64)
        assert recorder.num_rows == [4, 4, 4, 1, 1, 1]
        spread_BTK = x_BTK[:, ::2]
        assert torch.equal(model(spread_BTK), model(spread_BTK.contiguous()))


def parts(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer."""
    assert isinstance(layer, nn.Linear)
    return layer.weight, layer.bias


def test_gradients_are_torchs(recorder: Recorder) -> None:
    """With grad enabled a step changes nothing, in training mode too."""
    model, x_MK = small_model().train(), random_rows(2, 48)
    install_linears(model, recorder, {})
    with step():
        model(x_MK).sum().backward()

    assert recorder.num_rows == []
    assert all(parameter.grad is not None for parameter in model.parameters())


@torch.no_grad()
def test_rows_of_another_dtype_are_torchs(recorder: Recorder) -> None:
    """A model that was converted, moved or cut down after installing computes with what it has now."""
    model, x_MK = small_model(), random_rows(2, 48)
    install_linears(model, recorder, {})
    with step():
        with pytest.raises(RuntimeError, match="dtype"):
            model(x_MK.float())
        model.float()
        assert torch.equal(model(x_MK.float()), small_model().float()(x_MK.float()))
        layer = model[0].bfloat16()
        layer.register_parameter("bias", None)
        weight_NK, _ = parts(layer)
        weight_NK.data = weight_NK.data[:32]
        assert layer(x_MK).shape == (2, 32)

    assert recorder.num_rows == [2]


class OwnLinear(nn.Linear):
    """What an adapter or a quantised layer is."""


def test_other_kinds_of_layers_are_left_alone(recorder: Recorder) -> None:
    """Subclasses, parametrised layers, other dtypes and strided weights keep their class."""
    parametrised = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8).bfloat16())
    strided = nn.Linear(8, 8).bfloat16()
    strided.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.bfloat16).T[:, :4])
    model = nn.ModuleList(
        [OwnLinear(8, 8).bfloat16(), parametrised, nn.Linear(8, 8, bias=False), strided]
    )
    classes = [type(layer) for layer in model]

    assert install_linears(model, recorder, {}) == []
    assert [type(layer) for layer in model] == classes


@torch.no_grad()
def test_layers_parametrised_later_are_computed_as_such(recorder: Recorder) -> None:
    """A parametrisation over an installed layer wins, and uninstalling leaves it in place."""
    model, x_MK = small_model(), random_rows(2, 48)
    install_linears(model, recorder, {})
    torch.nn.utils.parametrizations.weight_norm(model[0])
    with step():
        model[0](x_MK)
        copy.deepcopy(model[0])(x_MK)
    uninstall_linears(model)
    with step():
        model[0](x_MK)

    assert recorder.num_rows == []
    assert isinstance(model[0], PagedLinear)


@torch.no_grad()
def test_copies_are_plain_layers(recorder: Recorder) -> None:
    """deepcopy, pickle and state_dict know nothing of kernels; the weights are the same."""
    model, x_MK = small_model(), random_rows(2, 48)
    names = list(model.state_dict())
    install_linears(model, recorder, {})
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    copies = [copy.deepcopy(model), copy.copy(model[0]), torch.load(stream, weights_only=False)]

    assert list(model.state_dict()) == names
    model.load_state_dict(small_model().state_dict())
    with step():
        for one in copies:
            assert not any(isinstance(module, PagedLinear) for module in one.modules())
            original = model if isinstance(one, nn.Sequential) else model[0]
            recorder.num_rows.clear()
            out_MN = one(x_MK)
            assert recorder.num_rows == []
            assert torch.equal(out_MN, original(x_MK))


def test_uninstalling_gives_layers_their_class_back(recorder: Recorder) -> None:
    """Both may be called again and again."""
    model = small_model()
    for _ in range(2):
        install_linears(model, recorder, {})
        assert all(type(layer) is PagedLinear for layer in model)
    for _ in range(2):
        uninstall_linears(model)

        assert all(type(layer) is nn.Linear for layer in model)
        assert vars(model[0]).keys() == vars(small_model()[0]).keys()


def test_shapes_that_were_tried_are_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape once, with its own number of layers; a bias is part of the shape."""
    tried: list[tuple[int, ...]] = []

    def passed(_kernels: object, layers: list[nn.Linear]) -> LinearChoice:
        tried.append((*layers[0].weight.shape, layers[0].bias is not None))
        return verdict(layers, most_rows=4)

    monkeypatch.setattr(linear, "try_layers", passed)
    trials: LinearTrials = {}
    first = install_linears(small_model(), Recorder(), trials)
    other = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 64, bias=False)).bfloat16()
    second = install_linears(other, Recorder(), trials)

    assert tried == [(64, 48, True), (48, 64, True), (64, 48, False)]
    assert [choice.num_layers for choice in first] == [2, 1]
    assert [(choice.num_outputs, choice.num_layers) for choice in second] == [(48, 1), (64, 1)]
    assert all(type(layer) is PagedLinear for layer in other)


def test_layers_that_lose_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict of 0 rows is reported, and takes back what other kernels had."""
    model = small_model()
    for most_rows, expected in ((2, PagedLinear), (0, nn.Linear)):
        monkeypatch.setattr(
            linear, "try_layers", lambda _, layers, most=most_rows: verdict(layers, most_rows=most)
        )
        choices = install_linears(model, Recorder(), {})

        assert [choice.most_rows for choice in choices] == [most_rows] * 2
        assert all(type(layer) is expected for layer in model)


@pytest.mark.parametrize("factor", [1.03, float("nan")])
def test_a_wrong_kernel_is_not_raced(factor: float) -> None:
    """An error beyond rounding is a verdict of 0 rows, with the error in it."""

    class Wrong(Recorder):
        def linear(self, *arguments: Any) -> None:
            super().linear(*arguments)
            if self.num_rows[-1] == 8:
                arguments[-1][:, -1] *= factor

    choice = try_layers(Wrong(), [nn.Linear(40, 300).bfloat16()])

    assert choice.most_rows == 0
    assert choice.speed_up is None
    assert not choice.error <= choice.torch_error


def test_the_kernel_serves_as_many_rows_as_it_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the first number of rows at which torch is faster; both errors are those of rounding."""
    ratios = {1: 1.5, 2: 1.4, 4: 1.0, 8: 0.9, 16: 2.0, 32: 2.0, 64: 1.0, 128: 1.2, 256: 1.5}
    monkeypatch.setattr(linear_trial, "_race", lambda _ours, _windows, rows, _rounds: ratios[rows])

    choice = try_layers(Recorder(), [nn.Linear(40, 300).bfloat16()])

    assert choice.most_rows == 4
    assert choice.wide_rows == 128
    assert choice.speed_up == 1.5
    assert 0 < choice.error == choice.torch_error < 2**-8


def test_every_layer_is_raced() -> None:
    """Windows cover whole outputs of all layers, at most 4 MB each, one layer after the other."""
    layers = [nn.Linear(2048, 2048).bfloat16() for _ in range(2)]
    windows = linear_trial._windows(layers)

    assert [tuple(weight.shape) for weight, _ in windows] == [(1024, 2048)] * 4
    assert [weight.data_ptr() for weight, _ in windows[:2]] == [
        layer.weight.data_ptr() for layer in layers
    ]
    assert all(bias is not None and len(bias) == 1024 for _, bias in windows)


@pytest.fixture
def forgetful() -> Iterator[Kernels]:
    """Kernels of which nothing was measured, before the test and after it."""
    found = load_kernels()
    if isinstance(found, KernelsAbsent):
        pytest.skip(f"no compiled kernels: {found.reason}")
    found.linear_trials.clear()
    yield found
    found.linear_trials.clear()


@pytest.mark.parametrize(("name", "mode"), [("llama", Mode.NATIVE), ("bloom", Mode.DENSE)])
@pytest.mark.usefixtures("forgetful")
def test_a_model_is_served_by_the_kernels(
    name: str, mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decoding calls them, tied heads included; an ordinary forward is what it was, to the last bit."""
    model, prompt = build_tiny(name).bfloat16(), list(range(10, 60))
    before_TV = logits_at_all_positions(model, prompt)
    monkeypatch.setattr(linear_trial, "_race", lambda *_: 2.0)
    chosen = EngineSettings(block_size=8, capacity="1MB")
    served = install(model, chosen)
    kernels = served.kernels
    assert served.paged.mode is mode
    assert isinstance(kernels, Kernels)
    num_layers = sum(type(module) is PagedLinear for module in model.modules())

    assert num_layers == sum(choice.num_layers for choice in served.linears) > 10
    assert all(choice.most_rows == 32 and choice.error < 2**-8 for choice in served.linears)
    assert torch.equal(logits_at_all_positions(model, prompt), before_TV)
    engine = Engine(served, chosen)
    calls: list[int] = []
    compute = kernels.linear

    def counted(*arguments: Tensor) -> None:
        calls.append(arguments[2].shape[:-1].numel())
        compute(*arguments)

    monkeypatch.setattr(kernels, "linear", counted)
    engine.add(prompt, SamplingParams(max_tokens=3), CacheOptions())
    while engine.has_work:
        engine.step()
    # The head of the prompt's last row, and two tokens.
    assert calls == [1] * (1 + 2 * num_layers)
    assert torch.equal(logits_at_all_positions(model, prompt), before_TV)


def test_a_second_model_repeats_no_trial(
    forgetful: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every install loads the kernels anew, but it is one library; other threads make other trials."""
    races: list[int] = []

    def race(*arguments: Any) -> float:
        races.append(arguments[-1])
        return 2.0

    monkeypatch.setattr(linear_trial, "_race", race)
    chosen = EngineSettings(block_size=8, capacity="1MB")
    first = install(build_tiny("llama").bfloat16(), chosen)
    num_races = len(races)
    second = install(build_tiny("llama", seed=1).bfloat16(), chosen)

    assert second.kernels is not first.kernels
    assert second.linears == first.linears
    assert len(races) == num_races > 0
    assert len(forgetful.linear_trials) == len(first.linears)
    forgetful.num_threads = 97  # as no other test has
    assert forgetful.linear_trials == {}
