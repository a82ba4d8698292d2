"""Image-scaling attacks: an image that a victim's downscaling turns into another one.

Xiao et al., USENIX Security 2019; Quiring et al., USENIX Security 2020. Without antialiasing a kernel reads few pixels
of a large image (`core.kernels`). These pixels alone decide what the victim sees, and viewers see the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from codefend.attacks.base import ImageAttack
from codefend.core.kernels import SPARSE, Kernel, matrix, resize
from codefend.types import Budget, CodefendError, Objective

ATTACKABLE: tuple[Kernel, ...] = (*SPARSE, "area")  # area: all pixels change, so viewers see the image as well
_ROUNDS = 100  # projections; images that the kernel's gaps allow take some ten
_CLOSE = 0.25 / 255


@dataclass(frozen=True)
class HiddenImage:
    """The objective: mean squared distance ``[B]`` of images, shrunk by ``kernel``, to the image that they hide.

    ``target`` is ``[B, 3, h, w]`` or ``[1, 3, h, w]`` in [0, 1], of the size to which the victim shrinks. Raises
    CodefendError for a kernel with antialiasing.
    """

    target: Tensor
    kernel: Kernel

    def __post_init__(self) -> None:
        if self.kernel not in ATTACKABLE:
            raise CodefendError(
                f"kernel {self.kernel} reads all pixels alike, so nothing can be hidden from viewers; "
                f"attackable: {', '.join(ATTACKABLE)}"
            )

    def __call__(self, images: Tensor) -> Tensor:
        shrunk = resize(images, (self.target.shape[-2], self.target.shape[-1]), self.kernel)
        return (shrunk - self.target.to(images)).square().flatten(1).mean(1)


def hide(images: Tensor, target: Tensor, kernel: Kernel, *, strength: float = 1.0) -> Tensor:
    """Images ``[B, 3, H, W]`` in [0, 1], changed so that ``kernel`` shrinks them to ``target`` ``[B or 1, 3, h, w]``.

    With R and C the kernel's matrices, the smallest change that solves R X Cᵀ = T is R⁺ (T - R S Cᵀ) C⁺ᵀ. It is
    alternated with the projection to [0, 1]; both sets are convex and, for kernels whose weights sum to 1, meet where
    the kernel has gaps. ``strength`` below 1 hides a mixture of the target and what the image shows anyway.

    Raises CodefendError for a target that is larger than the images.
    """
    (height, width), (h, w) = images.shape[-2:], target.shape[-2:]
    if h > height or w > width:
        raise CodefendError(f"an image of {w}x{h} pixels cannot be hidden in one of {width}x{height}; shrink it")
    rows, columns = matrix(kernel, height, h), matrix(kernel, width, w)
    up_rows, up_columns = torch.linalg.pinv(rows), torch.linalg.pinv(columns)
    x = images.to("cpu", torch.float64)
    shown = rows @ x @ columns.T
    wanted = shown + strength * (target.to(shown) - shown)
    for _ in range(_ROUNDS):
        missing = wanted - rows @ x @ columns.T
        if float(missing.abs().max()) < _CLOSE:
            break
        x = (x + up_rows @ missing @ up_columns.T).clamp(0, 1)
    return x.to(images)


@dataclass(kw_only=True)
class ScalingAttack(ImageAttack):
    """`hide` for the objective `HiddenImage`, in closed form; norm, eps and steps do not apply.

    Another objective names no image to hide: the images are returned unchanged.
    """

    strength: float = 1.0
    name: str = "scaling"

    def perturb(self, objective: Objective, clean: Tensor, budget: Budget, generator: Generator | None) -> Tensor:
        best = self.best_of(objective, clean, budget.eot, 0)
        if isinstance(objective, HiddenImage):
            x = hide(clean, objective.target, objective.kernel, strength=self.strength)
            best.update(x, self.score(objective, x, budget.eot, 1))
        return best.images

    def outside(self, images: Tensor, clean: Tensor) -> Tensor:
        """0 for each image: the pixels that the kernel reads may take any value."""
        return torch.zeros(len(clean), dtype=clean.dtype, device=clean.device)
