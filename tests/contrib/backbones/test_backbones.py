"""Models of diffusers as purifiers: schedules against the library's, gradients, folders, the hub's format."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Tensor

import diffusers_tiny
from codefend import purifiers
from codefend.contrib.backbones.latent import boundary, load_latents
from codefend.contrib.backbones.pixels import load_denoiser, save_denoiser
from codefend.contrib.backbones.vp import VPDenoiser
from codefend.purifiers.diffpure import denoise_from, vp_sigma
from codefend.types import CodefendError

lib = diffusers_tiny.lib


@pytest.fixture(scope="module")
def ddpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_tiny.ddpm(tmp_path_factory.mktemp("ddpm"))


@pytest.fixture(scope="module")
def stable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_tiny.stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return diffusers_tiny.stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in guided-diffusion's style: learned variance and its blocks."""
    shape = {"out_channels": 6, "resnet_time_scale_shift": "scale_shift", "downsample_type": "resnet"}
    return diffusers_tiny.ddpm(tmp_path_factory.mktemp("guided"), variance="learned_range", **shape)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 18, 24, generator=torch.Generator().manual_seed(0))


class Fixed(torch.nn.Module):
    """Returns a constant and records its inputs."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.weight, self.answer, self.inputs = torch.nn.Parameter(torch.zeros(1)), answer, []
        self.config = MagicMock(block_out_channels=(1, 1), in_channels=3)

    def forward(self, x: Tensor, steps: Tensor) -> Any:
        self.inputs.append((x, steps))
        return MagicMock(sample=self.answer)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_a_model_that_knows_the_noise_gives_the_clean_image(prediction: str, images: Tensor) -> None:
    scheduler = lib.DDPMScheduler(prediction_type=prediction)
    noise, step = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([100, 700])
    clean = 2 * images - 1
    right = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, step)}
    model = Fixed(right[prediction])
    net = VPDenoiser(model, scheduler.config, scheduler.alphas_cumprod, pixels=True)
    sigma = net.get_buffer("sigmas")[step]
    prediction = net(images + sigma.view(-1, 1, 1, 1) * noise, torch.zeros(2), sigma)
    assert torch.allclose(prediction, images, atol=1e-4)
    noisy, steps = model.inputs[0]
    assert torch.allclose(noisy, scheduler.add_noise(clean, noise, step), atol=1e-5)
    assert torch.allclose(steps, step.float(), atol=1e-2)


def test_steps_of_the_usual_table_are_our_times(ddpm: Path) -> None:
    net = load_denoiser(str(ddpm))
    times = torch.tensor([0.01, 0.05, 0.15, 0.3, 0.9])
    assert torch.allclose(net.steps(vp_sigma(times)), 1000 * times - 0.6, atol=0.3, rtol=4e-3)  # betas in steps
    edges = torch.tensor([1e-6, 1e6])
    assert net.steps(edges).tolist() == [0, 999]
    levels = net.levels(0.1, 4)
    assert torch.allclose(levels[:4], net.get_buffer("sigmas").double()[[99, 74, 49, 24]], rtol=1e-5)
    assert levels[-1] == 0


def test_reverse_steps_equal_ddim(ddpm: Path, images: Tensor) -> None:
    """Against the library's own loop, from the same noisy image, at whole steps."""
    net, scheduler = load_denoiser(str(ddpm)), lib.DDIMScheduler(clip_sample=False, set_alpha_to_one=False)
    steps = [400, 200, 0]
    levels = torch.cat([net.get_buffer("sigmas")[steps].double(), torch.zeros(1)])
    noisy = images + float(levels[0]) * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    ours = denoise_from(net, noisy, levels, eta=0.0)
    scheduler.num_inference_steps = 5  # its steps are 200 long
    x = (2 * noisy - 1) * scheduler.alphas_cumprod[400] ** 0.5
    for step in steps[:2]:
        x = scheduler.step(net.model(x, step).sample, step, x).prev_sample
    last = net.model(x, 0).sample
    x = (x - (1 - scheduler.alphas_cumprod[0]) ** 0.5 * last) / scheduler.alphas_cumprod[0] ** 0.5
    assert torch.allclose(ours, x / 2 + 0.5, atol=1e-4)


def test_consistency_steps_equal_lcm(tmp_path: Path) -> None:
    purifier: Any = purifiers.load(
        f"hf-latent:{diffusers_tiny.stable_diffusion(tmp_path, consistency=True)}", t=0.5, steps=1, consistency=True
    )
    net, scheduler = (
        purifier.latents.denoiser,
        lib.LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"),
    )
    assert set(net.conditions) == {"encoder_hidden_states", "timestep_cond"}
    skip, out = (float(value) for value in boundary(torch.tensor(499.0)))
    theirs = scheduler.get_scalings_for_boundary_condition_discrete(499)
    assert (skip, out) == pytest.approx([float(value) for value in theirs])
    z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    latents = purifier.denoise(z, torch.Generator().manual_seed(5))
    level = net.get_buffer("sigmas")[499]
    noisy = (z + level * torch.randn(z.shape, generator=torch.Generator().manual_seed(5))) / (1 + level**2).sqrt()
    scheduler.set_timesteps(timesteps=[499])
    expected = scheduler.step(net.predict(noisy, torch.tensor([499.0])), scheduler.timesteps[0], noisy).prev_sample
    assert torch.allclose(latents, expected, atol=1e-3)
    assert purifier.evaluations == 1


CONTRACT = (
    "hf-diffpure:{ddpm}:t=0.1,steps=2",
    "hf-bridge:{ddpm}",
    "hf-diffpure:{guided}:t=0.1,steps=2",
    "hf-latent:{stable}:steps=2",
    "hf-latent:{xl}:steps=1",
)


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name: str, ddpm: Path, guided: Path, stable: Path, xl: Path, images: Tensor) -> None:
    purifier = purifiers.load(name.format(ddpm=ddpm, guided=guided, stable=stable, xl=xl))
    x = images.clone().requires_grad_()
    purified = purifier(x, generator=torch.Generator().manual_seed(0))
    assert purified.shape == images.shape
    assert ((purified >= 0) & (purified <= 1)).all()
    (grad,) = torch.autograd.grad(purified.sum(), x)
    assert (grad.flatten(1).abs().amax(1) > 0).all()
    again = purifier(images, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(purified, again, atol=1e-5)
    assert torch.equal(again, purifier(images, generator=torch.Generator().manual_seed(1))) is not purifier.stochastic
    assert purifier.multiply_adds(18, 24) > 0
    assert ":" in purifier.name


def test_the_autoencoder_alone_has_no_noise_and_no_denoiser(stable: Path, images: Tensor) -> None:
    purifier: Any = purifiers.load(f"hf-latent:{stable}:t=0")
    assert not purifier.stochastic
    assert purifier.evaluations == 0
    vae = purifier.latents.vae
    padded = torch.nn.functional.pad(images, (0, 0, 0, 2), mode="reflect")
    expected = vae(2 * padded - 1, sample_posterior=False).sample[..., :18, :] / 2 + 0.5
    assert torch.allclose(purifier(images), expected.clamp(0, 1), atol=1e-5)
    latents = load_latents(str(stable))
    assert not any(p.requires_grad for p in latents.parameters())


def test_a_bridge_starts_as_the_models_denoiser_at_the_shifts_size(ddpm: Path, images: Tensor) -> None:
    net = load_denoiser(str(ddpm))
    as_noise = net(images, torch.zeros(2), torch.full((2,), net.shift))
    assert torch.allclose(net(images, torch.ones(2), torch.zeros(2)), as_noise, atol=1e-6)
    assert torch.allclose(purifiers.load(f"hf-bridge:{ddpm}")(images), as_noise.clamp(0, 1), atol=1e-6)


def test_a_saved_denoiser_loads_as_a_pipeline(ddpm: Path, images: Tensor, tmp_path: Path) -> None:
    net = load_denoiser(str(ddpm))
    save_denoiser(net, tmp_path)
    again: Any = purifiers.load(tmp_path)
    assert torch.allclose(again.net.get_buffer("sigmas"), net.get_buffer("sigmas"), rtol=1e-4)
    assert torch.allclose(again(images), purifiers.load(f"hf-bridge:{ddpm}")(images), atol=1e-5)
    net.model.save_pretrained(tmp_path / "bare")  # a UNet2DModel alone
    alone = load_denoiser(str(tmp_path / "bare"))
    assert torch.allclose(alone(images, torch.zeros(2), torch.ones(2)), net(images, torch.zeros(2), torch.ones(2)))


def test_with_a_learned_variance_the_noise_is_the_first_half_of_the_output(
    guided: Path, images: Tensor, tmp_path: Path
) -> None:
    net = load_denoiser(str(guided))
    alone = lib.UNet2DModel.from_config(net.model.config, out_channels=3).eval()
    weights = net.model.state_dict()
    alone.load_state_dict({k: v[:3] if k.startswith("conv_out") else v for k, v in weights.items()})
    table = lib.DDPMScheduler().alphas_cumprod
    theirs = VPDenoiser(alone, {}, table, pixels=True)
    level = torch.full((2,), 0.2)
    assert torch.allclose(net(images, torch.zeros(2), level), theirs(images, torch.zeros(2), level), atol=1e-5)
    save_denoiser(net, tmp_path / "pipeline")
    net.model.save_pretrained(tmp_path / "bare")
    for name in ("pipeline", "bare"):
        again = load_denoiser(str(tmp_path / name))
        assert (again.variance, again.model.config.out_channels) == ("learned_range", 6)
    pipe = lib.DDPMPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)  # the library's own sampler
    with pytest.raises(CodefendError, match="4 channels"):
        load_denoiser(str(diffusers_tiny.ddpm(tmp_path / "four", out_channels=4)))


def test_xl_is_conditioned_on_the_image_size_only(xl: Path, images: Tensor, tmp_path: Path) -> None:
    """At a whole step the denoiser equals the library's own U-Net with the pipeline's inputs."""
    latents = load_latents(str(xl))
    net = latents.denoiser
    assert not any(value.any() for value in net.conditions.values())  # trained on zeros where there is no text
    pipe = lib.StableDiffusionXLPipeline.from_pretrained(xl, add_watermarker=False)
    z = torch.randn(2, 4, 12, 10, generator=torch.Generator().manual_seed(0))
    sizes = pipe._get_add_time_ids((24, 20), (0, 0), (24, 20), torch.float32, text_encoder_projection_dim=16)
    more = {"text_embeds": torch.zeros(2, 16), "time_ids": sizes.repeat(2, 1)}
    with torch.no_grad():
        expected = pipe.unet(z, 300, torch.zeros(2, 77, 32), added_cond_kwargs=more).sample
    assert torch.allclose(net.predict(z, torch.full((2,), 300.0)), expected, atol=1e-5)
    assert not torch.allclose(net.predict(z[..., :8], torch.full((2,), 300.0)), expected[..., :8], atol=1e-3)
    worded = load_latents(str(diffusers_tiny.stable_diffusion_xl(tmp_path / "worded", zeros=False)))
    empty = pipe.encode_prompt("", device=torch.device("cpu"), do_classifier_free_guidance=False)
    assert torch.allclose(worded.denoiser.conditions["encoder_hidden_states"], empty[0], atol=1e-5)
    assert torch.allclose(worded.denoiser.conditions["text_embeds"], empty[2], atol=1e-5)
    refiner = diffusers_tiny.stable_diffusion_xl(tmp_path / "refiner", projection_class_embeddings_input_dim=56)
    with pytest.raises(CodefendError, match="a refiner"):
        load_latents(str(refiner))


def test_the_autoencoder_of_xl_stays_in_float32(xl: Path) -> None:
    latents = load_latents(str(xl), "float16")
    assert (latents.vae.dtype, latents.denoiser.model.dtype) == (torch.float32, torch.float16)


def test_half_precision_stays_near(stable: Path, images: Tensor) -> None:
    full, half = (purifiers.load(f"hf-latent:{stable}:t=0.1,steps=1,dtype={d}") for d in ("float32", "bfloat16"))
    first, second = (p(images, generator=torch.Generator().manual_seed(0)) for p in (full, half))
    assert first.dtype == second.dtype == torch.float32
    assert float((first - second).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hf-diffpure:", "name a model"),
        ("hf-latent:ID_OR_FOLDER", "name a model"),
        ("hf-diffpure:./nowhere", "no such model folder"),
        ("hf-latent:./nowhere", "no such model folder"),
        ("hf-diffpure:{empty}", "cannot load"),
        ("hf-latent:{empty}", "cannot load"),
        ("hf-latent:{ddpm}", "a Stable Diffusion text-to-image model is needed"),
        ("hf-diffpure:{ddpm}:t=0", "above 0"),
        ("hf-bridge:{ddpm}:gate=true", "no detection score"),
        ("hf-diffpure:{ddpm}:step=3", "did you mean 'steps'"),
        ("hf-latent:{stable}:t=2", "0 to 1"),
    ],
)
def test_mistakes_are_named(name: str, words: str, ddpm: Path, stable: Path, tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match=words):
        purifiers.load(name.format(ddpm=ddpm, stable=stable, empty=tmp_path))


def test_conditional_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CodefendError, match="no unconditional model"):
        load_denoiser(str(diffusers_tiny.ddpm(tmp_path / "classes", num_class_embeds=3)))
    with pytest.raises(CodefendError, match="predicts 'flow'"):
        VPDenoiser(Fixed(torch.zeros(1)), {"prediction_type": "flow"}, torch.ones(2) / 2, pixels=True)
