"""Variance-preserving models of `diffusers` as denoisers in this project's coordinates.

A diffusers model takes ``x_t = sqrt(abar) y + sqrt(1 - abar) n`` at a step k of its table ``alphas_cumprod``,
with y an image in [-1, 1] or a latent. Here everything is ``x + sigma n`` (`purifiers.nets`): the same divided by
sqrt(abar), with sigma = sqrt((1 - abar) / abar) / gain, where gain is 2 for images in [0, 1] and 1 for latents.
The step is interpolated linearly in log sigma and may be fractional: the models embed it as a real number.
For the usual table (linear betas from 1e-4 to 0.02 in 1000 steps) step k is our VP time (k + 1) / 1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from codefend.core.assets import needs
from codefend.core.checkpoints import find_nonfinite
from codefend.types import CodefendError

FIXED, LEARNED = "fixed_small", "learned_range"  # variances that diffusers' schedulers know; guided-diffusion learns it
PREDICTIONS = ("epsilon", "v_prediction", "sample")


class VPDenoiser(nn.Module):
    """``(noisy [B,C,H,W], s [B], sigma [B]) -> clean [B,C,H,W]`` around a diffusers U-Net: `nets.Denoiser`.

    ``shift`` is the root mean square of an adversarial perturbation in the units of ``x``: the model treats a shift of
    ``s`` times as much like noise of that level, from where a bridge is fine-tuned. 0 leaves ``s`` without effect.
    ``conditions`` are further inputs of the model, one row each, repeated for the batch; with ``text_embeds`` (SDXL)
    the model also gets the image's size, ``cell`` pixels for each latent cell.
    """

    def __init__(
        self,
        model: nn.Module,
        scheduler: Mapping[str, Any],
        alphas_cumprod: Tensor,
        *,
        pixels: bool,
        shift: float = 0.0,
        conditions: Mapping[str, Tensor] | None = None,
        cell: int = 1,
    ) -> None:
        """Raises CodefendError for an unknown parametrization."""
        super().__init__()
        self.model, self.shift, self.cell = model, shift, cell
        self.prediction = str(scheduler.get("prediction_type", "epsilon"))
        self.variance = str(scheduler.get("variance_type", FIXED))  # saved with the model, not used here
        if self.prediction not in PREDICTIONS:
            raise CodefendError(f"the model predicts {self.prediction!r}; known: {', '.join(PREDICTIONS)}")
        self.gain, self.offset = (2.0, 0.5) if pixels else (1.0, 0.0)
        config: Any = model.config
        self.multiple = 2 ** (len(config.block_out_channels) - 1)
        self.conditions = nn.ParameterDict(
            {name: nn.Parameter(value, requires_grad=False) for name, value in (conditions or {}).items()}
        )
        sigmas = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt() / self.gain
        self.register_buffer("sigmas", sigmas.float(), persistent=False)  # [steps], rising

    def forward(self, x: Tensor, s: Tensor, sigma: Tensor) -> Tensor:
        x, s, sigma = x.float(), s.float(), sigma.float()  # the model's own dtype is for the model alone
        level = (sigma**2 + (s * self.shift) ** 2).sqrt().clamp_min(1e-6)
        wide = (self.gain * level).view(-1, 1, 1, 1)  # noise in the model's own units
        mean = (1 + wide**2).rsqrt()  # sqrt(abar)
        centred = self.gain * (x - self.offset)
        output = self.predict(mean * centred, self.steps(level))
        if self.prediction == "epsilon":
            clean = centred - wide * output
        elif self.prediction == "v_prediction":  # v = sqrt(abar) n - sqrt(1 - abar) y (Salimans & Ho 2022, app. D)
            clean = mean**2 * centred - mean * wide * output
        else:
            clean = output
        return clean / self.gain + self.offset

    def predict(self, x: Tensor, steps: Tensor) -> Tensor:
        """The model's own output for its ``x_t`` at ``steps`` ``[B]``, without a learned variance.

        The variance is the second half of the channels (guided-diffusion, Dhariwal & Nichol 2021, arXiv 2105.05233).
        """
        inputs: dict[str, Any] = {
            name: value.expand(len(x), *value.shape[1:]) for name, value in self.conditions.items()
        }
        if (
            "text_embeds" in inputs
        ):  # SDXL (arXiv 2307.01952, sec. 2.2): original size, crop at 0, target size; in pixels
            size = [side * self.cell for side in x.shape[-2:]]
            sizes = x.new_tensor([*size, 0, 0, *size]).expand(len(x), 6)
            inputs["added_cond_kwargs"] = {"text_embeds": inputs.pop("text_embeds"), "time_ids": sizes}
        dtype = next(self.model.parameters()).dtype
        output: Tensor = self.model(x.to(dtype), steps, **inputs).sample
        return output[:, : x.shape[1]].float()

    def steps(self, sigma: Tensor) -> Tensor:
        """The model's fractional steps ``[B]`` of noise levels ``sigma`` ``[B]``, clamped to the table."""
        table = self.get_buffer("sigmas").log()
        log_sigma = sigma.detach().to(table).log().clamp(table[0], table[-1])
        after = torch.searchsorted(table, log_sigma).clamp(1, len(table) - 1)
        low, high = table[after - 1], table[after]
        return (after - 1) + (log_sigma - low) / (high - low)

    def levels(self, t: float, count: int) -> Tensor:
        """Noise levels ``[count + 1]`` from the share ``t`` of the table down to 0, at equal distances in steps."""
        table = self.get_buffer("sigmas").double().cpu()
        step = torch.linspace(t * len(table) - 1, -1, count + 1, dtype=torch.float64).clamp_min(-1)
        index = step.clamp(0, len(table) - 1)
        low, high = index.floor().long(), index.ceil().long()
        levels = torch.lerp(table[low], table[high], index - low)
        return torch.where(step < 0, levels * (1 + step), levels)  # below step 0: linearly down to 0

    def multiply_adds(self, height: int, width: int) -> int:
        """Multiply-adds of one evaluation of one input of this size: convolutions, linear layers, attention."""
        from torch.utils.flop_counter import FlopCounterMode

        config: Any = self.model.config
        x = self.get_buffer("sigmas").new_zeros(1, config.in_channels, height, width)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.predict(x, x.new_zeros(1))
        return int(counter.get_total_flops() // 2)


def load_part(kind: Any, source: str, folder: str, **options: Any) -> Any:
    """A component of a diffusers pipeline from its subfolder, or from the root as in older repositories.

    Raises CodefendError when there is none.
    """
    try:
        return kind.from_pretrained(source, subfolder=folder, **options)
    except OSError as first:
        try:
            return kind.from_pretrained(source, **options)
        except (OSError, ValueError) as error:
            raise CodefendError(
                f"cannot load the {folder} of {source!r}: {str(first).strip().splitlines()[0]}"
            ) from error


def require() -> Any:
    """Import diffusers. Raises CodefendError when it is not installed."""
    with needs("this", "diffusers"):
        import diffusers
    return diffusers


def require_finite(source: str, *models: nn.Module) -> None:
    """Raise CodefendError for weights that hold NaN or infinity."""
    for model in models:
        if name := find_nonfinite(dict(model.named_parameters())):
            raise CodefendError(f"weight {name} of {source!r} holds NaN or infinity; download or save the model again")


def table_of(scheduler: Any, source: str) -> Tensor:
    """``alphas_cumprod`` of a loaded scheduler. Raises CodefendError for one that isn't variance-preserving."""
    table = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(table, Tensor):
        raise CodefendError(f"{source!r} has a {type(scheduler).__name__}, which has no variance-preserving table")
    return table
