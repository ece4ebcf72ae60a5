"""The LightningModule: wiring of model, objective, random numbers and optimizer. It holds no formula."""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from i2am_train.attention.trace import ScoreTap
from i2am_train.config.training import OptimizationConfig
from i2am_train.data.dataset import TryOnBatch
from i2am_train.errors import ConfigError
from i2am_train.losses.objective import Objective
from i2am_train.models.lora import add_adapters
from i2am_train.models.tryon import TryOnModel
from i2am_train.ops.numerics import to_device
from i2am_train.training.optimization import make_optimizer, make_schedule, prepare_networks, set_trainable
from i2am_train.training.step import Draws, TrainingBatch, batches_of_step, draw, step_losses

_FROZEN = ("model.vae.", "model.reference_encoder.")
"""Networks that never train, as prefixes of their weights' names."""


class TryOnModule(L.LightningModule):
    """Trains a :class:`TryOnModel`; validation is done by callbacks, which read ``model``.

    ``cached`` says that batches come encoded from a cache.
    """

    def __init__(
        self,
        model: TryOnModel,
        objective: Objective,
        options: OptimizationConfig,
        seed: int = 0,
        *,
        cached: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.options = options
        self.seed = seed
        self.cached = cached
        self._tap: ScoreTap | None = None
        self._gradient_norm: Tensor | None = None
        self._encoders: list[TryOnModel] = []  # in a list, so that they are no part of the module
        self._counts: tuple[tuple[int, list[list[int]]], Tensor] | None = None
        if options.trainable == "lora":
            add_adapters(model.unet, options.lora_rank, options.adapter_alpha)
        set_trainable(model, options.trainable)
        prepare_networks(model, options)
        model.train()  # loading leaves networks in evaluation mode, where diffusers checkpoints no gradients
        if objective.terms:
            _check_objective(objective, model)

    def on_train_start(self) -> None:
        """Attaches the score tap, after strategies have made their copies."""
        if self.objective.terms:
            self._tap = ScoreTap(self.model, layers=list(self.objective.layers))
            self._tap.attach()
        # In float32, autocast would round the frozen networks' weights again in every step, and compute their norms in
        # float32. (Not float16, in which Stable Diffusion's VAE overflows.)
        if not self.cached and self.device.type == "cuda" and self.options.precision == "bf16-mixed":
            self._encoders = [self.model.with_encoders(torch.bfloat16)]
        self._move_frozen("cpu")

    def on_validation_start(self) -> None:
        """Validation generates images, for which the frozen networks are needed."""
        self._move_frozen(self.device)

    def on_validation_end(self) -> None:
        self._move_frozen("cpu")

    def _move_frozen(self, device: torch.device | str) -> None:
        """Training from a cache, or with copies of them, needs no frozen network on the GPU.

        Not with DDP, whose networks must stay together.
        """
        if (self.cached or self._encoders) and not isinstance(self.trainer.strategy, DDPStrategy):
            self.model.vae.to(device)
            self.model.reference_encoder.to(device)

    def teardown(self, stage: str) -> None:
        """Detaches the score tap. Lightning leaves this out after an error; whoever calls ``fit`` then does it."""
        self._encoders.clear()
        if self._tap is not None:
            self._tap.close()
            self._tap = None

    def on_train_epoch_start(self) -> None:
        """Frozen parts stay in evaluation mode, whatever ``train()`` Lightning called."""
        self.model.vae.eval()
        self.model.reference_encoder.eval()

    def training_step(self, batch: TrainingBatch, batch_index: int) -> Tensor:
        """One step's total loss; every part is logged as ``loss/<name>``, its mean over the processes.

        The weight of a term with a schedule is logged as ``weight/<name>``.
        """
        progress = self.trainer.global_step / self.options.steps
        losses = step_losses(
            self.model,
            batch,
            self._draws(batch["index"].tolist()),
            self.objective,
            self._tap,
            snr_gamma=self.options.snr_gamma,
            counts=self._counts_per_batch(batch_index),
            progress=progress,
            encoders=self._encoders[0] if self._encoders else None,
        )
        logged = {f"loss/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(logged, batch_size=len(batch["name"]), sync_dist=True)
        terms = self.objective.terms.items()
        # As tensors of the CPU: Lightning would copy plain numbers to the device, and wait for it.
        weights = {
            f"weight/{name}": torch.tensor(term.weight_at(progress))
            for name, term in terms
            if term.schedule != "constant"
        }
        self.log_dict(weights, batch_size=len(batch["name"]))
        return losses["total"]

    def gradient_norm(self) -> Tensor:
        """Norm of this step's gradients before clipping, on their device; worked out once a step, without a wait."""
        if self._gradient_norm is None:
            self._gradient_norm = get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        return self._gradient_norm

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """By the norm, which has been worked out already.

        Not Lightning's: it refuses fused optimizers in all mixed precisions, while only float16 has a loss scale that
        they would undo after the clipping.
        """
        if gradient_clip_val:
            clip_grads_with_norm_(self.parameters(), gradient_clip_val, self.gradient_norm())
        self._gradient_norm = None

    def validation_step(self, batch: TryOnBatch, batch_index: int) -> None:
        """Nothing: the evaluation callback does the work."""

    def test_step(self, batch: TryOnBatch, batch_index: int) -> None:
        """Nothing: the evaluation callback does the work."""

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with warm-up and cosine decay over the trained weights."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = make_optimizer(trained, self.options)
        schedule = make_schedule(optimizer, self.options)
        # The name is what the learning rate is logged as (tracking.names.LEARNING_RATE).
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leaves the frozen networks out of the file; they come with the checkpoint that training started from."""
        checkpoint["state_dict"] = {
            name: value for name, value in checkpoint["state_dict"].items() if self._trains(name)
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Puts the frozen networks back, so that Lightning's strict loading still checks every trained weight."""
        frozen = {name: v for name, v in self.state_dict().items() if not self._trains(name)}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def whole_model(self) -> TryOnModel | None:
        """The model as a single process would hold it, on the first process, and None on others; collective.

        This is what is saved, whatever the strategy: some of them keep only a part of the weights in each process.
        """
        weights = self.trainer.strategy.lightning_module_state_dict()
        if not self.trainer.is_global_zero:
            return None
        return self.model.with_weights({n.removeprefix("model."): v for n, v in weights.items()})

    def _trains(self, name: str) -> bool:
        """Whether a weight may differ from the one in the model that training started from."""
        if self.options.trainable == "lora":
            return ".lora_" in name
        return not name.startswith(_FROZEN)

    def _counts_per_batch(self, batch_index: int) -> Tensor | None:
        """Mean number of samples in the step's batches that each term counts, worked out once a step.

        None where the step has a single batch.
        """
        trainer = self.trainer
        if trainer.accumulate_grad_batches == 1 or not self.objective.terms:
            return None
        loader: Any = trainer.train_dataloader
        batches = batches_of_step(
            loader.sampler.samples(),
            loader.batch_size,
            batch_index,
            trainer.accumulate_grad_batches,
            int(trainer.num_training_batches),
        )
        step = (self.current_epoch, batches)
        if self._counts is None or self._counts[0] != step:
            counted = [self.objective.counted(~d.dropped, d.timesteps) for d in map(self._draws, batches)]
            self._counts = step, torch.cat(counted, dim=1).sum(dim=1) / len(batches)
        return self._counts[1]

    def _draws(self, indices: list[int]) -> Draws:
        draws = draw(
            self.seed,
            self.current_epoch,
            indices,
            latent=self.model.latent_size,
            timesteps=self.model.schedule.length,
            condition_dropout=self.options.condition_dropout,
        )
        return Draws(*(to_device(values, self.device) for values in draws))


def _check_objective(objective: Objective, model: TryOnModel) -> None:
    """Refuses what does not fit the model, before training starts.

    Raises:
        CaptureError: a layer does not exist, or a term needs the share of its attention that goes to the reference and
            all of it does.
        ConfigError: a layer is named twice, or a window ends beyond the model's timesteps.
    """
    tap = ScoreTap(model, layers=list(objective.layers))
    names = tap.layers
    if len(set(names)) < len(names):
        given = ", ".join(f"{layer} is {name}" for layer, name in zip(objective.layers, names, strict=True))
        raise ConfigError(f"objective.layers names a layer twice ({given}). Leave one of them out.")
    if "log_mass" in objective.needs:
        for layer in objective.layers:
            tap.require_mass(layer)
    for name, term in objective.terms.items():
        if term.timesteps is not None and term.timesteps[1] > model.schedule.length:
            raise ConfigError(
                f"objective.terms.{name}.timesteps={list(term.timesteps)} is not possible: expected [first, end) with "
                f"an end of at most {model.schedule.length}, the number of the model's timesteps."
            )
