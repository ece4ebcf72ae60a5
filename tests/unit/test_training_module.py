"""training/module.py: what a Lightning checkpoint holds, and when the score tap is attached."""

from collections.abc import Callable
from typing import Any

import pytest

from i2am_train.config.objective import ObjectiveConfig
from i2am_train.config.training import OptimizationConfig
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.losses.objective import make_objective
from i2am_train.training.module import TryOnModule

pytestmark = pytest.mark.filterwarnings("default")  # Lightning's own deprecations


def refined(model: Any, layers: Any = 2, **entry: Any) -> TryOnModule:
    terms = {"cwg": {"weight": 1.0, **entry}}
    objective = make_objective(ObjectiveConfig(terms=terms, layers=layers))
    return TryOnModule(model, objective, OptimizationConfig())


def saved(module: TryOnModule) -> dict[str, Any]:
    checkpoint = {"state_dict": dict(module.state_dict())}
    module.on_save_checkpoint(checkpoint)
    return checkpoint


def test_checkpoints_leave_frozen_networks_out(make_small_model: Callable[..., Any]) -> None:
    """They hold every trained weight and no frozen one, and load strictly all the same."""
    module = refined(make_small_model())
    checkpoint = saved(module)
    assert {name for name, p in module.named_parameters() if p.requires_grad} == set(checkpoint["state_dict"])
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"], strict=True)


def test_a_missing_trained_weight_is_noticed(make_small_model: Callable[..., Any]) -> None:
    """Only frozen weights are filled in from the model in memory."""
    module = refined(make_small_model())
    checkpoint = saved(module)
    del checkpoint["state_dict"]["model.projector.null_tokens"]
    module.on_load_checkpoint(checkpoint)
    with pytest.raises(RuntimeError, match=r"Missing key.*null_tokens"):
        module.load_state_dict(checkpoint["state_dict"], strict=True)


def test_the_tap_comes_and_goes(make_small_model: Callable[..., Any]) -> None:
    """Attached when training starts, not before; detached by teardown, which may be called twice."""
    model = make_small_model()
    module = refined(model)

    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())

    assert hooks() == 0
    module.on_train_start()
    assert hooks() > 0
    module.teardown("fit")
    module.teardown("fit")
    assert hooks() == 0


def test_a_layer_that_does_not_exist(make_small_model: Callable[..., Any]) -> None:
    """It fails when the module is made, not at the first step."""
    with pytest.raises(CaptureError, match=r"No attention layer is called 'up_blocks\.7'"):
        refined(make_small_model(), layers="up_blocks.7")


def test_a_layer_twice(make_small_model: Callable[..., Any]) -> None:
    """By its number and by its name."""
    with pytest.raises(ConfigError, match=r"layers names a layer twice \(2 is up_blocks\.1\.attentions\.1, up_blocks"):
        refined(make_small_model(), layers=[2, "up_blocks.1.attentions.1"])


def test_a_window_beyond_the_model_s_timesteps(make_small_model: Callable[..., Any]) -> None:
    """The number of timesteps is the scheduler's."""
    refined(make_small_model(), timesteps=[500, 1000])
    with pytest.raises(ConfigError, match=r"terms\.cwg\.timesteps=\[500, 1001\] .* end of at most 1000"):
        refined(make_small_model(), timesteps=[500, 1001])
