"""The try-on model as a pipeline of diffusers.

This file is copied into exported folders and runs there with nothing but torch, diffusers and transformers: it imports
no other module of i2am_train, and says again what ``models.tryon`` and ``models.sampling`` say. A test holds the images
of both against each other, bit by bit.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.nn.functional import interpolate

_ADVICE = (
    "Make it with X.from_config(pipeline.scheduler.config), where X is DDIMScheduler, EulerDiscreteScheduler, "
    "UniPCMultistepScheduler or DPMSolverMultistepScheduler."
)


class TryOnPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Dresses persons in reference garments. The options are those of ``model_index.json`` in the model's folder."""

    model_cpu_offload_seq = "reference_encoder->projector->unet->vae"
    _lora_loadable_modules = ["unet"]
    text_encoder = None

    def __init__(
        self,
        unet: UNet2DConditionModel,
        vae: AutoencoderKL,
        reference_encoder: torch.nn.Module,
        projector: torch.nn.Module,
        scheduler: DDIMScheduler,
        height: int = 512,
        width: int = 384,
        reference_height: int = 518,
        reference_width: int = 392,
        class_token: bool = False,
        reference_mean: list = [0.485, 0.456, 0.406],  # type: ignore[type-arg]  # noqa: B006
        reference_std: list = [0.229, 0.224, 0.225],  # type: ignore[type-arg]  # noqa: B006
        layer: int | str = 2,
        noise_schedule: dict | None = None,  # type: ignore[type-arg]
    ) -> None:
        super().__init__()
        self.register_modules(
            unet=unet, vae=vae, reference_encoder=reference_encoder, projector=projector, scheduler=scheduler
        )
        self.register_to_config(
            height=height,
            width=width,
            reference_height=reference_height,
            reference_width=reference_width,
            class_token=class_token,
            reference_mean=list(reference_mean),
            reference_std=list(reference_std),
            layer=layer,
            noise_schedule=noise_schedule,
        )
        schedule = dict(scheduler.config) if noise_schedule is None else noise_schedule
        self._trained_scheduler = DDIMScheduler.from_config(schedule)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.latent_size = (height // factor, width // factor)
        self.image_processor = VaeImageProcessor(vae_scale_factor=factor)
        self._guidance_scale = 1.0

    @property
    def guidance_scale(self) -> float:
        """Scale of classifier-free guidance in the call that runs."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """True if the batch is [unconditional, conditional]."""
        return self._guidance_scale != 1.0

    @property
    def reference_grid(self) -> tuple[int, int]:
        """Rows and columns of the garment's patch tokens."""
        patch = self.reference_encoder.config.patch_size
        return self.config.reference_height // patch, self.config.reference_width // patch

    @torch.no_grad()
    def __call__(
        self,
        garment: Any,
        agnostic: Any,
        densepose: Any,
        num_inference_steps: int = 50,
        guidance_scale: float = 5.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Tensor]], Any] | None = None,
    ) -> Any:
        """Images of the persons in the garments.

        Args:
            garment: product photographs: a picture or a list of them (PIL), or a tensor ``[batch, 3, height, width]``
                of values in [-1, 1]; pictures are resized to the model's size.
            agnostic: the persons without what they wear there, as many as garments.
            densepose: DensePose renderings of the persons.
            num_inference_steps: evaluations of the network.
            guidance_scale: scale of classifier-free guidance; 1 is none.
            generator: source of the initial noise, one or one for each image.
            output_type: ``pil``, ``np``, or ``pt`` for a tensor of values in [-1, 1].
            return_dict: False gives the tuple ``(images,)``.
            callback_on_step_end: called after each step with pipeline, step, timestep and ``{"latents": ...}``.
        """
        self._check_scheduler()
        device, dtype = self._execution_device, self.unet.dtype
        pictures = [self._tensor(value, device, dtype) for value in (garment, agnostic, densepose)]
        if len({len(value) for value in pictures}) > 1:
            raise ValueError(
                f"{', '.join(str(len(value)) for value in pictures)} pictures of garment, agnostic and densepose were "
                "given. Give as many of each."
            )
        self._guidance_scale = guidance_scale
        conditions = [self._latents(value) for value in pictures[1:]]
        tokens = self._tokens(pictures[0])
        count = len(tokens)
        if self.do_classifier_free_guidance:
            null = self.projector.null_tokens.to(tokens.dtype).expand(count, -1, -1)
            tokens = torch.cat([null, tokens])
            conditions = [value.repeat(2, 1, 1, 1) for value in conditions]
        if not isinstance(generator, list):
            latents = randn_tensor((count, 4, *self.latent_size), generator, device)
        else:
            rows = [randn_tensor((1, 4, *self.latent_size), one, device) for one in generator]
            latents = torch.cat(rows)
        if len(latents) != count:
            raise ValueError(f"{len(latents)} generators were given for {count} images.")
        steps = self._steps(num_inference_steps, device)
        latents = latents * self.scheduler.init_noise_sigma
        for index, (timestep, following) in enumerate(self.progress_bar(steps)):
            scaled = self.scheduler.scale_model_input(latents, timestep)
            rows = scaled.repeat(2, 1, 1, 1) if self.do_classifier_free_guidance else scaled
            at = torch.as_tensor(timestep, device=device).expand(len(rows))
            inputs = torch.cat([rows.to(dtype), *conditions], dim=1)
            prediction = self.unet(inputs, at, tokens).sample.float()
            if self.do_classifier_free_guidance:
                unconditional, conditional = prediction.chunk(2)
                prediction = unconditional + guidance_scale * (conditional - unconditional)
            latents = self._step(prediction, latents, timestep, following, generator)
            if callback_on_step_end is not None:
                changed = callback_on_step_end(self, index, int(timestep), {"latents": latents})
                latents = (changed or {}).get("latents", latents)
        decoded = self.vae.decode(latents.to(dtype) / self.vae.config.scaling_factor).sample
        images: Any = decoded.clamp(-1, 1)
        if output_type != "pt":
            images = self.image_processor.postprocess(images.float(), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _tensor(self, value: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(device, dtype)
        size = (self.config.height, self.config.width)
        made: Tensor = self.image_processor.preprocess(value, *size)
        return made.to(device, dtype)

    def _latents(self, images: Tensor) -> Tensor:
        latents: Tensor = self.vae.encode(images).latent_dist.mean * self.vae.config.scaling_factor
        return latents

    def _tokens(self, garment: Tensor) -> Tensor:
        """Context tokens: the garment's patches row by row, after the class token if the model keeps it."""
        size = (self.config.reference_height, self.config.reference_width)
        if garment.shape[-2:] != size:
            garment = interpolate(garment, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (
            torch.tensor(values, device=garment.device, dtype=garment.dtype)[:, None, None]
            for values in (self.config.reference_mean, self.config.reference_std)
        )
        pixels = ((garment + 1) / 2 - mean) / std
        taken = inspect.signature(self.reference_encoder.forward).parameters
        any_size = "interpolate_pos_encoding"
        options = {any_size: True} if any_size in taken else {}
        tokens = self.reference_encoder(pixel_values=pixels, **options).last_hidden_state
        rows, columns = self.reference_grid
        special = tokens.shape[1] - rows * columns
        kept = torch.cat([tokens[:, : int(self.config.class_token)], tokens[:, special:]], dim=1)
        projected: Tensor = self.projector(kept)
        return projected

    def _check_scheduler(self) -> None:
        """Refuses a scheduler that would not sample this model, before anything is computed."""
        scheduler, own = self.scheduler, self._trained_scheduler
        name, kind = type(scheduler).__name__, own.config.prediction_type
        parts = ("step", "scale_model_input", "init_noise_sigma")
        fits = all(hasattr(scheduler, part) for part in parts)
        taken = inspect.signature(scheduler.step).parameters if fits else {}
        needed = [key for key, one in taken.items() if one.default is one.empty]
        if needed != ["model_output", "timestep", "sample"]:
            raise ValueError(f"{name} does not sample a model of {kind}. {_ADVICE}")
        if scheduler.config.get("prediction_type") != kind:
            raise ValueError(
                f"{name} is for prediction_type={scheduler.config.get('prediction_type')!r}, and this model was "
                f"trained with {kind!r}. {_ADVICE}"
            )
        levels = getattr(scheduler, "alphas_cumprod", torch.empty(0)).float().cpu()
        trained = own.alphas_cumprod
        if levels.shape != trained.shape or not torch.allclose(levels, trained, rtol=0, atol=1e-4):
            raise ValueError(
                f"{name} has other noise levels than those that this model was trained with (betas, or "
                f"rescale_betas_zero_snr={own.config.rescale_betas_zero_snr}, which not every scheduler knows). "
                f"{_ADVICE}"
            )

    @property
    def _samples_as_trained(self) -> bool:
        """Whether steps are the model's own; another scheduler, or DDIM with other options, makes diffusers' steps."""
        own = {key: value for key, value in self._trained_scheduler.config.items() if key[0] != "_"}
        is_ddim = type(self.scheduler).__name__ == "DDIMScheduler"
        return is_ddim and all(self.scheduler.config.get(key) == own[key] for key in own)

    def _steps(self, count: int, device: torch.device) -> list[tuple[Any, int]]:
        """Timesteps of evaluation, each with the one that its step leads to.

        DDIM steps on the authors' grid {0, 20, ..., 980, 999}, which diffusers has not; another scheduler, put in
        place of the model's own, on its own grid.
        """
        if not self._samples_as_trained:
            self.scheduler.set_timesteps(count, device=device)
            timesteps = self.scheduler.timesteps
            if timesteps[0] < timesteps[-1]:
                raise ValueError(f"{type(self.scheduler).__name__} goes from pictures to noise. {_ADVICE}")
            return [(timestep, 0) for timestep in timesteps]
        length = self.scheduler.config.num_train_timesteps
        grid = [length * index // count for index in range(count)] + [length - 1]
        return [(grid[i], grid[i - 1]) for i in range(count, 0, -1)]

    def _step(self, prediction: Tensor, latents: Tensor, timestep: Any, following: int, generator: Any) -> Tensor:
        if not self._samples_as_trained:
            step = self.scheduler.step
            draws = "generator" in inspect.signature(step).parameters
            options = {"generator": generator} if draws else {}
            stepped: Tensor = step(prediction, timestep, latents, return_dict=False, **options)[0]
            return stepped
        alphas = self.scheduler.alphas_cumprod.double()
        signals = alphas.sqrt().float().to(latents.device)
        levels = (1 - alphas).clamp_min(0).sqrt().float().to(latents.device)
        signal, level = signals[timestep], levels[timestep]
        if self.scheduler.config.prediction_type == "epsilon":
            clean, noise = (latents - level * prediction) / signal, prediction
        else:
            clean = signal * latents - level * prediction
            noise = level * latents + signal * prediction
        noised: Tensor = signals[following] * clean + levels[following] * noise
        return noised if following else clean

    @classmethod
    def load_lora_into_text_encoder(cls, *_: Any, **__: Any) -> None:
        """Does nothing: there is no text encoder."""
