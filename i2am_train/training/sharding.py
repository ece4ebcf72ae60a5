"""Fully sharded training (ZeRO 3, FSDP2): each process keeps its part of the trained networks and of AdamW's moments.

``fully_shard`` and not the older FullyShardedDataParallel: parameters stay single tensors under their own names, so
that frozen and trained weights (``trainable=lora``, ``v1``) and clipping by the norm need no special case, and it runs
on CPUs (gloo), where the tests compare it with one process. Lightning drives it by ``ModelParallelStrategy``; what it
writes would depend on the number of processes, so saving and loading are ours: whole and ordinary.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from i2am_train.models.tryon import TryOnModel
from i2am_train.training.module import TryOnModule

# -- networks ------------------------------------------------------------------------------------------------------


def _shard(model: TryOnModel, mesh: DeviceMesh) -> None:
    """Shards U-Net and projector over the processes of ``mesh``, block by block.

    VAE and reference encoder stay whole in every process: they have no gradients and no moments, are needed in
    evaluation by processes with unequally many samples, and with ``data.cache`` not at all in training.

    Weights are gathered in float32, and autocast makes bfloat16 of them as in every strategy. A
    ``MixedPrecisionPolicy`` would halve the traffic, but rounds the norms' weights, too, which CPUs refuse.
    """
    for network in (model.unet, model.projector):
        for block in _blocks(network):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(network, mesh=mesh, reshard_after_forward=True)


def _blocks(network: nn.Module) -> Iterator[nn.Module]:
    """What is gathered at once: the stages of a U-Net, the transformer blocks of a projector."""
    for name, child in network.named_children():
        if isinstance(child, nn.ModuleList):
            yield from child
        elif name == "mid_block":
            yield child


def _gather(model: nn.Module) -> None:
    """Puts all sharded weights together in every process until :func:`_release`; collective.

    Meanwhile forwards without gradient need no other process, and no traffic in each of the sampler's steps.
    """
    for part in _sharded_parts(model):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def _release(model: nn.Module) -> None:
    """Ends :func:`_gather`; harmless without it."""
    for part in _sharded_parts(model):
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def _sharded_parts(model: nn.Module) -> Iterator[FSDPModule]:
    return (part for part in model.modules() if isinstance(part, FSDPModule))


class ShardedTryOnModule(TryOnModule):
    """A :class:`TryOnModule` whose trained networks are sharded once the processes know each other."""

    def configure_model(self) -> None:
        """Lightning's place for it, before there is an optimizer."""
        assert self.device_mesh is not None
        _shard(self.model, self.device_mesh["data_parallel"])

    def on_validation_start(self) -> None:
        """Processes generate unequally many batches, so none may need another for a forward."""
        super().on_validation_start()
        _gather(self.model)

    def on_validation_epoch_end(self) -> None:
        """Back to parts, before ``on_validation_end`` of callbacks (``callbacks.weights``)."""
        _release(self.model)


# -- states --------------------------------------------------------------------------------------------------------


def whole(value: Tensor) -> Tensor:
    """The whole of a tensor, of which this process may have a part only; collective if it has.

    >>> import torch
    >>> whole(torch.ones(2))  # of a single process
    tensor([1., 1.])
    """
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_state(state: dict[str, Any], *, first: bool) -> dict[str, Any]:
    """A state with its sharded tensors whole on the ``first`` process, and nothing on others; collective.

    >>> import torch
    >>> whole_state({"weight": torch.ones(2)}, first=True), whole_state({"weight": torch.ones(2)}, first=False)
    ({'weight': tensor([1., 1.])}, {})
    """

    def collected(value: DTensor) -> Tensor | None:
        together = whole(value)
        return together.cpu() if first else None  # one at a time in the others' memory

    together: dict[str, Any] = apply_to_collection(state, DTensor, collected)
    return together if first else {}


def sharded_like(value: Any, target: Any) -> Any:
    """This process's part of a whole tensor, cut like ``target``; the value itself where there is nothing to cut.

    >>> import torch
    >>> sharded_like(torch.ones(2), torch.zeros(2))  # nothing to cut
    tensor([1., 1.])
    """
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    if value.shape != target.shape:  # a step counter, or a mistake that loading will name
        return value
    mesh, placements = target.device_mesh, target.placements
    return distribute_tensor(value.to(target.device), mesh, placements, src_data_rank=None)


class ShardedStrategy(ModelParallelStrategy):
    """All processes shard. States that it gives and takes are those of a single process, whole and by the same names.

    So checkpoints and models are ordinary files, which any number of processes goes on from.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        """Lightning would shard over machines only, and split tensors between the devices of one."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over the optimizer's state, as it does without sharding."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights on the first process, and nothing on others; collective."""
        assert self.lightning_module is not None
        return whole_state(self.lightning_module.state_dict(), first=self.is_global_zero)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's whole state on the first process, and nothing on others; collective."""
        if isinstance(optimizer, LightningOptimizer):
            optimizer = optimizer.optimizer
        return whole_state(optimizer.state_dict(), first=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every process reads the file."""
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Each process takes its part of the weights."""
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        parts = {name: sharded_like(value, own.get(name)) for name, value in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Each process takes its part of the moments."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [one for group in optimizer.param_groups for one in group["params"]]
            parts = {
                number: {key: sharded_like(value, parameters[number]) for key, value in moments.items()}
                for number, moments in state["state"].items()
            }  # fmt: skip
            optimizer.load_state_dict(state | {"state": parts})
