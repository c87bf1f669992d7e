"""How a model is served here: mode, kernels, linear layers and KV format, each tried on its own weights."""

from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from kvkeep.config import EngineSettings
from kvkeep.hf.format_probe import FormatProbe
from kvkeep.hf.geometry import ModelGeometry, measure_geometry
from kvkeep.hf.kv_formats import asked_formats, measure_format, needs_measuring
from kvkeep.hf.latent_cache import has_latents
from kvkeep.hf.linear import LinearChoice, install_linears, uninstall_linears
from kvkeep.hf.paged_model import Mode
from kvkeep.hf.selftest import SelfTest, choose_mode
from kvkeep.hf.trial_logits import Served
from kvkeep.native import Kernels, KernelsAbsent, load_kernels
from kvkeep.spec import with_format

__all__ = ["Verdict", "judge"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found; `geometry` has the formats of K/V, layers that are kept exact included.

    `kernels` are the compiled CPU kernels in use, or why there are none; `linears` is what they were found to
    be worth for each shape of linear layer. `self_test` is None where it was switched off, and `format_probe`
    also where there is nothing to decide: no quantised format, or exact layers that were asked for.
    """

    geometry: ModelGeometry
    mode: Mode
    kernels: Kernels | KernelsAbsent
    linears: tuple[LinearChoice, ...]
    self_test: SelfTest | None
    format_probe: FormatProbe | None

    @property
    def usable_kernels(self) -> Kernels | None:
        """The kernels, if there are any."""
        return _usable(self.kernels)


def judge(model: PreTrainedModel, settings: EngineSettings) -> Verdict:
    """Measure and test `model`; linear layers that kernels do well are theirs from now on.

    Raises UnsupportedModelError when it cannot be served right, or not in the format asked for, and
    ConfigError when its K/V cannot have that format at all.
    """
    model.eval()
    geometry = measure_geometry(
        model, settings.block_size, exact_first_block=settings.kv_exact_first_block
    )
    spec = asked_formats(geometry.spec, settings)
    kernels = _find_kernels(settings, next(model.parameters()).device)
    linears = _install_linears(model, kernels)
    if not settings.self_test:
        mode = _untested_mode(model, geometry, settings.mode, kernels)
        return Verdict(replace(geometry, spec=spec), mode, kernels, linears, None, None)
    self_test = choose_mode(model, geometry, settings.mode, _usable(kernels))
    kernels = _unless_refused(kernels, self_test)
    if isinstance(kernels, KernelsAbsent):
        linears = _install_linears(model, kernels)
    probe = None
    if needs_measuring(spec, settings):
        served = Served(model, geometry, self_test.mode, _usable(kernels))
        probe = measure_format(served, settings.kv_format)
        spec = with_format(spec, settings.kv_format, exact_layers=probe.exact_layers)
    geometry = replace(geometry, spec=spec)
    return Verdict(geometry, self_test.mode, kernels, linears, self_test, probe)


def _find_kernels(settings: EngineSettings, device: torch.device) -> Kernels | KernelsAbsent:
    if settings.kernels == "torch":
        return KernelsAbsent('kernels="torch" was asked for')
    if device.type != "cpu":
        return KernelsAbsent(f"the model is on {device.type}, and these are kernels of the CPU")
    return load_kernels()


def _usable(kernels: Kernels | KernelsAbsent) -> Kernels | None:
    return kernels if isinstance(kernels, Kernels) else None


def _install_linears(
    model: PreTrainedModel, kernels: Kernels | KernelsAbsent
) -> tuple[LinearChoice, ...]:
    if isinstance(kernels, KernelsAbsent):
        uninstall_linears(model)  # an engine before this one may have left some
        return ()
    return tuple(install_linears(model, kernels, kernels.linear_trials))


def _unless_refused(
    kernels: Kernels | KernelsAbsent, self_test: SelfTest
) -> Kernels | KernelsAbsent:
    """The kernels, or the reason when the chosen mode was right only without them."""
    tried = [
        trial
        for trial in self_test.trials
        if trial.with_kernels and trial.mode is self_test.mode and not self_test.with_kernels
    ]
    if not tried:
        return kernels
    reason = tried[-1].failure or f"error {tried[-1].error:.2g}"
    return KernelsAbsent(f"the self-test refused them: {reason}")


def _untested_mode(
    model: PreTrainedModel, geometry: ModelGeometry, asked: str, kernels: Kernels | KernelsAbsent
) -> Mode:
    if asked != "auto":
        return Mode(asked)
    if has_latents(model, geometry):
        return Mode.GATHER if isinstance(kernels, KernelsAbsent) else Mode.LATENT
    return Mode.HYBRID if geometry.recurrent_layers else Mode.NATIVE
