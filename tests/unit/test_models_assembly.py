"""models/assembly.py and workflows/init.py: models from files of every format, and what is refused."""

import argparse
import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file

from i2am_train.config.models import InitConfig
from i2am_train.errors import CheckpointError, ConfigError, RunFolderError
from i2am_train.models import tryon
from i2am_train.models.assembly import NORMALISATIONS, assemble
from i2am_train.models.pretrained import load_encoder
from i2am_train.models.single_file import KeyMismatchError
from i2am_train.models.tryon import TryOnModel
from i2am_train.types import GridSize, PredictionType
from i2am_train.weight_files import read_weights
from i2am_train.workflows.models import init as run

Layout = Callable[..., dict[str, torch.Tensor]]
SIZE = {"height": 128, "width": 64}


@pytest.fixture(scope="session")
def pipeline(make_parts: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a pipeline in diffusers' layout, and one of each encoder beside it."""
    folder = tmp_path_factory.mktemp("pipeline")
    for name in ("unet", "vae"):
        make_parts(name).save_pretrained(folder / "sd" / name)
    for name in ("dinov2", "clip"):
        make_parts(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="session")
def sd_file(pipeline: Path, original_layout: Layout, make_parts: Callable[..., Any]) -> dict[str, torch.Tensor]:
    """The same pipeline as the tensors of one file: trained and averaged U-Net, VAE, and what nobody here needs."""
    unet = UNet2DConditionModel.from_pretrained(pipeline / "sd" / "unet")
    weights = original_layout(unet, AutoencoderKL.from_pretrained(pipeline / "sd" / "vae"))
    averaged = {
        "model_ema." + "".join(key.split(".")[1:]): value * 2
        for key, value in weights.items()
        if key.startswith("model.diffusion_model.")
    }
    others = {"cond_stage_model.transformer.embedding": torch.ones(3), "betas": torch.ones(4)}
    return {name: value.contiguous() for name, value in (weights | averaged | others).items()}


def options(pipeline: Path, output: Path, **changes: Any) -> InitConfig:
    given = {"unet": str(pipeline / "sd"), "encoder": str(pipeline / "dinov2"), "output": output}
    return InitConfig(**{**given, **SIZE, **changes})


def weights_of(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def assert_same(network: torch.nn.Module, expected: torch.nn.Module) -> None:
    mine, theirs = network.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        if name != "conv_in.weight":
            assert torch.equal(value, theirs[name]), name


def assert_starts_as_stable_diffusion(model: TryOnModel, unet: torch.nn.Module) -> None:
    """Every weight is the original's, and the added input channels are zero."""
    assert_same(model.unet, unet)
    assert torch.equal(model.unet.conv_in.weight[:, :4], unet.conv_in.weight)
    assert model.unet.conv_in.weight.shape[1] == 12
    assert not model.unet.conv_in.weight[:, 4:].any()


def test_from_a_pipeline_folder(
    pipeline: Path, make_parts: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The written folder is the parts' weights, and its geometry and normalisation are stored in it."""
    run(options(pipeline, tmp_path / "model"))
    model = TryOnModel.from_pretrained(tmp_path / "model")
    assert_starts_as_stable_diffusion(model, make_parts("unet"))
    assert_same(model.vae, make_parts("vae"))
    assert_same(model.reference_encoder, make_parts("dinov2"))
    assert model.image_size == GridSize(128, 64)
    assert model.latent_size == GridSize(16, 8)
    assert (model.config.reference_height, model.config.reference_width) == (140, 70)
    assert model.reference_grid == GridSize(10, 5)
    assert model.projector.null_tokens.shape == (1, 50, 24)
    assert len(model.projector.blocks) == 3
    assert model.projector.blocks[0].attn1.heads == 1
    assert model.config.reference_mean == tryon.IMAGENET_MEAN
    assert model.schedule.prediction_type is PredictionType.EPSILON
    assert model.schedule.signal[999] ** 2 == pytest.approx(0.00466010, abs=1e-7)
    output = capsys.readouterr().out
    assert "10x5 patches" in output
    assert f"i2am train init={tmp_path / 'model'}" in output
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_paper_s_reference_size() -> None:
    """512x384 at patches of 14 is 518x392, 37x28 patches."""
    from i2am_train.models.assembly import reference_geometry

    class Encoder:
        class config:  # noqa: N801
            patch_size = 14

    config = InitConfig(unet="x", output=Path("y"))
    assert reference_geometry(config, Encoder()) == (GridSize(37, 28), GridSize(518, 392))  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["safetensors", "ckpt", "half"])
def test_from_a_single_file(
    pipeline: Path, sd_file: dict[str, torch.Tensor], make_parts: Callable[..., Any], tmp_path: Path, ending: str
) -> None:
    """The trained weights and the VAE of one file, by default; the report has every key exactly once."""
    file = tmp_path / f"v1-5-pruned.{'ckpt' if ending == 'half' else ending}"
    if ending == "safetensors":
        save_file(sd_file, file)
    else:
        dtype = torch.float16 if ending == "half" else torch.float32
        tensors = {name: value.to(dtype) for name, value in sd_file.items()}
        torch.save({"state_dict": OrderedDict(tensors), "global_step": 7}, file)
    run(options(pipeline, tmp_path / "model", unet=str(file)))
    model = TryOnModel.from_pretrained(tmp_path / "model")
    unet, vae = make_parts("unet"), make_parts("vae")
    if ending == "half":
        unet, vae = unet.half().float(), vae.half().float()
    assert_starts_as_stable_diffusion(model, unet)
    assert_same(model.vae, vae)
    for report in json.loads((tmp_path / "model.keys.json").read_text()):
        seen = [*report["mapped"], *report["unexpected"], *report["left_out"]]
        assert sorted(seen) == sorted(sd_file)
        assert report["missing"] == []
        assert report["unexpected"] == []


def test_the_single_file_reads_as_diffusers_reads_it(
    pipeline: Path, sd_file: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Same weights as diffusers' own from_single_file with a local configuration."""
    save_file(sd_file, tmp_path / "sd.safetensors")
    theirs = UNet2DConditionModel.from_single_file(
        str(tmp_path / "sd.safetensors"), config=str(pipeline / "sd"), subfolder="unet"
    )
    model, _ = assemble(options(pipeline, tmp_path / "model", unet=str(tmp_path / "sd.safetensors")))
    assert_starts_as_stable_diffusion(model, theirs)


def test_averaged_weights_on_request(
    pipeline: Path, sd_file: dict[str, torch.Tensor], make_parts: Callable[..., Any], tmp_path: Path
) -> None:
    """ema=true takes model_ema; a file without it is refused."""
    save_file(sd_file, tmp_path / "both.safetensors")
    config = options(pipeline, tmp_path / "m", unet=str(tmp_path / "both.safetensors"), ema=True)
    model, (report, _) = assemble(config)
    expected = make_parts("unet").conv_out.weight * 2
    assert torch.equal(model.unet.conv_out.weight, expected)
    assert report.unexpected == []
    without = {k: v for k, v in sd_file.items() if not k.startswith("model_ema")}
    save_file(without, tmp_path / "one.safetensors")
    config = options(pipeline, tmp_path / "m", unet=str(tmp_path / "one.safetensors"), ema=True)
    with pytest.raises(CheckpointError, match=r"no averaged weights .* ema=false"):
        assemble(config)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_a_fine_tuned_vae(
    pipeline: Path, original_layout: Layout, make_parts: Callable[..., Any], tmp_path: Path, prefix: str
) -> None:
    """A Lightning checkpoint of a VAE alone, with its discriminator: StableVITON's form."""
    vae = make_parts("vae")
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(5)
    weights = original_layout(vae=vae, vae_prefix=prefix)
    weights["loss.discriminator.main.0.weight"] = torch.ones(2, 2)
    file = tmp_path / "VITONHD_VAE_finetuning.ckpt"
    torch.save({"epoch": 3, "state_dict": weights, "optimizer_states": [{"lr": 1e-4}]}, file)
    model, (report,) = assemble(options(pipeline, tmp_path / "m", vae=str(file)))
    assert_same(model.vae, vae)
    assert report.left_out == ["loss.discriminator.main.0.weight"]


@pytest.mark.parametrize(("kind", "normalisation"), [("dinov2", "imagenet"), ("clip", "clip")])
@pytest.mark.parametrize("class_token", [False, True])
def test_encoders(
    pipeline: Path, make_parts: Callable[..., Any], tmp_path: Path, kind: str, normalisation: Any, class_token: bool
) -> None:
    """DINOv2, and the vision half of a CLIP folder, at another size than theirs, saved and loaded again."""
    config = options(pipeline, tmp_path / "m", encoder=str(pipeline / kind), class_token=class_token)
    model, _ = assemble(config)
    mean, std = NORMALISATIONS[normalisation]
    assert (model.config.reference_mean, model.config.reference_std) == (mean, std)
    tokens = 50 + class_token
    garment = torch.rand(2, 3, 140, 70) * 2 - 1
    model.projector.blocks, model.projector.norm = torch.nn.ModuleList(), torch.nn.Identity()
    model.projector.output = torch.nn.Identity()
    pixels = (garment / 2 + 0.5 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    whole = make_parts(kind)
    with torch.no_grad():
        given = model.encode_reference(garment)
        expected = (
            whole(pixel_values=pixels)
            if kind == "dinov2"
            else whole.vision_model(pixel_values=pixels, interpolate_pos_encoding=True)
        )
    torch.testing.assert_close(given, expected.last_hidden_state[:, 1 - class_token :])
    assert given.shape == (2, tokens, 32)
    model.reference_encoder.save_pretrained(tmp_path / "encoder")
    assert_same(load_encoder(str(tmp_path / "encoder")), model.reference_encoder)


def test_options_reach_the_model(pipeline: Path, tmp_path: Path) -> None:
    """Normalisation, sizes, projector, prediction and seed are as asked for."""
    config = options(
        pipeline,
        tmp_path / "m",
        normalisation="authors",
        reference_height=56,
        reference_width=42,
        projector_blocks=1,
        projector_heads=4,
        prediction_type=PredictionType.V_PREDICTION,
        seed=5,
    )
    model, _ = assemble(config)
    assert model.config.reference_mean == model.config.reference_std == [0.5] * 3
    assert model.reference_grid == GridSize(4, 3)
    assert [block.attn1.heads for block in model.projector.blocks] == [4]
    assert model.schedule.prediction_type is PredictionType.V_PREDICTION
    assert model.schedule.signal[-1] == 0
    again, _ = assemble(config)
    assert torch.equal(again.projector.null_tokens, model.projector.null_tokens)
    config.seed = 6
    other, _ = assemble(config)
    assert not torch.equal(other.projector.null_tokens, model.projector.null_tokens)


def test_a_pickle_with_objects_is_refused(pipeline: Path, tmp_path: Path) -> None:
    """Neither a harmless object nor one that runs a program is read; the error says how to convert elsewhere."""
    harmless = tmp_path / "lightning.ckpt"
    namespace = argparse.Namespace(lr=1)
    torch.save({"state_dict": {"a": torch.ones(2)}, "hyper_parameters": namespace}, harmless)
    marker = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    harmful = tmp_path / "harmful.pt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "x": Harmful()}, harmful)
    old = tmp_path / "old.bin"
    torch.save({"a": torch.ones(2), "x": namespace}, old, _use_new_zipfile_serialization=False)
    for file, name in ((harmless, "argparse.Namespace"), (harmful, "builtins.getattr"), (old, "Namespace")):
        with pytest.raises(CheckpointError, match=name) as error:
            assemble(options(pipeline, tmp_path / "m", unet=str(file)))
        assert "weights_only=False" in str(error.value)
        assert "--network none" in str(error.value)
        assert f"give {file.stem}.safetensors" in str(error.value)
    assert not marker.exists()


def test_the_advised_conversion_works(tmp_path: Path) -> None:
    """The Python in that error, run as it stands, makes a file that is read."""
    shared = torch.ones(2, 3)
    torch.save({"state_dict": {"a": shared, "b": shared.T}, "x": argparse.Namespace()}, tmp_path / "old.ckpt")
    with pytest.raises(CheckpointError, match="python -c") as error:
        read_weights(tmp_path / "old.ckpt")
    code = str(error.value).split('python -c "')[1].split('"')[0]
    code = code.replace("'old.", f"'{tmp_path}/old.")
    exec(compile(code, "advice", "exec"), {})  # noqa: S102
    assert read_weights(tmp_path / "old.safetensors").keys() == {"a", "b"}


def _truncated(file: Path) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    return file


def test_damaged_files(pipeline: Path, sd_file: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Half a download, a pointer, a web page, another kind of file, none at all: each says so."""
    save_file(sd_file, tmp_path / "a.safetensors")
    torch.save({"state_dict": sd_file}, tmp_path / "a.ckpt")
    (tmp_path / "page.ckpt").write_text("<html>404</html>")
    (tmp_path / "empty.ckpt").write_bytes(b"")
    (tmp_path / "lfs.ckpt").write_text("version https://git-lfs.github.com/spec/v1\n")
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "a.yaml").write_text("a: 1")
    shutil.copytree(pipeline / "sd", tmp_path / "sd")
    _truncated(tmp_path / "sd" / "unet" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "bare").mkdir()
    for source, message in (
        (_truncated(tmp_path / "a.safetensors"), "cannot be read: .* half downloaded"),
        (_truncated(tmp_path / "a.ckpt"), "cannot be read: .* half downloaded"),
        (tmp_path / "page.ckpt", "16 bytes. cannot be read"),
        (tmp_path / "empty.ckpt", "0 bytes. cannot be read"),
        (tmp_path / "lfs.ckpt", "git lfs pull"),
        (tmp_path / "list.pt", "no named tensors"),
        (tmp_path / "a.yaml", "no weight file by its name"),
        (tmp_path / "none.ckpt", "There is no file"),
        (tmp_path / "no" / "folder", "no file or folder .* no name on the hub"),
        (tmp_path / "sd", "cannot be read: .* half downloaded"),
        (tmp_path / "bare", "neither config.json nor unet/config.json .found: nothing"),
    ):
        with pytest.raises(CheckpointError, match=message):
            assemble(options(pipeline, tmp_path / "m", unet=str(source)))


@pytest.mark.parametrize("part", ["unet", "vae", "encoder"])
def test_a_name_on_the_hub_without_network(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The error says how to bring the files here."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"fetched .nobody/none; .*'hf download OWNER/NAME"):
        assemble(options(pipeline, tmp_path / "m", **{part: "nobody/none"}))


def test_a_folder_without_some_weights(pipeline: Path, tmp_path: Path) -> None:
    """What diffusers and transformers would draw at random with a warning is an error here."""
    from safetensors.torch import load_file

    for part, file in (("sd/unet", "diffusion_pytorch_model"), ("dinov2", "model")):
        shutil.copytree(pipeline, tmp_path / part)
        weights = load_file(pipeline / part / f"{file}.safetensors")
        weights.popitem()
        save_file(weights, tmp_path / part / part / f"{file}.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match="lack 1 tensors"):
            assemble(options(tmp_path / part, tmp_path / "m"))


def test_pickles_in_folders(pipeline: Path, make_parts: Callable[..., Any], tmp_path: Path) -> None:
    """Tensors alone are read; anything else is refused, and nothing in it runs."""
    marker = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (marker,))

    for part, kind, file in (
        ("unet", "unet", "diffusion_pytorch_model.bin"),
        ("encoder", "dinov2", "pytorch_model.bin"),
    ):
        folder = tmp_path / part
        network = make_parts(kind)
        network.config.save_pretrained(folder) if part == "encoder" else network.save_config(folder)
        torch.save(network.state_dict(), folder / file)
        model, _ = assemble(options(pipeline, tmp_path / "m", **{part: str(folder)}, **own_vae(pipeline)))
        assert_same(model.unet if part == "unet" else model.reference_encoder, network)
        torch.save(network.state_dict() | {"x": Harmful()}, folder / file)
        with pytest.raises(CheckpointError, match=r"a pickle with more than tensors in it .builtins"):
            assemble(options(pipeline, tmp_path / "m", **{part: str(folder)}, **own_vae(pipeline)))
    assert not marker.exists()


def own_vae(pipeline: Path) -> dict[str, str]:
    return {"vae": str(pipeline / "sd")}


@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        ("unet", {"in_channels": 9}, "9 input and 4 output .* Inpainting"),
        ("unet", {"out_channels": 8}, "4 input and 8 output"),
        ("unet", {"cross_attention_dim": (24, 24, 32, 32)}, "different widths by level"),
        ("unet", {"layers_per_block": 1}, "6 decoder layers .* nine of Stable Diffusion"),
        (
            "unet",
            {
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "block_out_channels": (32, 32),
            },
            "3 decoder layers",
        ),
        ("vae", {"scaling_factor": 0.13025}, r"scaling factor 0\.13025 \(expected 0\.18215\)"),
        ("vae", {"latent_channels": 16}, r"latent channels 16 \(expected 4\)"),
        ("vae", {"block_out_channels": (32, 32, 32)}, r"downsampling 4 \(expected 8\)"),
        ("vae", {"shift_factor": 0.1}, "shifts its latents .shift_factor"),
    ],
)
def test_parts_that_do_not_fit(
    pipeline: Path, make_parts: Callable[..., Any], tmp_path: Path, part: str, changes: dict[str, Any], message: str
) -> None:
    """Refused from the configuration, before weights are read: here there are none."""
    make_parts(part, **changes).save_config(tmp_path / part)
    with pytest.raises(CheckpointError, match=message):
        assemble(options(pipeline, tmp_path / "m", **{part: str(tmp_path / part)}))


def test_sizes_that_do_not_fit(pipeline: Path, tmp_path: Path) -> None:
    """Image, patch, projector and options that contradict each other."""
    for changes, message in (
        ({"height": 96}, "halve the picture 6 times, so both must be multiples of 64"),
        ({"reference_height": 128}, "patches of 14 pixels.* 140x70"),
        ({"projector_heads": 5}, "does not divide the encoder's width 32"),
    ):
        with pytest.raises(ConfigError, match=message):
            assemble(options(pipeline, tmp_path / "m", **changes))
    with pytest.raises(ConfigError, match=r"ema=true chooses among the weights of a single file"):
        assemble(options(pipeline, tmp_path / "m", ema=True))
    with pytest.raises(ConfigError, match=r"ema=true is not possible: .* false with custom"):
        InitConfig(output=tmp_path / "m", custom=Path("y"), ema=True)
    for changes in ({}, {"unet": "x", "custom": Path("y")}):
        with pytest.raises(ConfigError, match="What to start from is not clear"):
            InitConfig(output=tmp_path / "m", **changes)


def test_a_single_file_of_another_topology(pipeline: Path, sd_file: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Missing, misshapen and unknown weights are named, all of them in a file beside the model that was not made."""
    first = "model.diffusion_model."
    file = tmp_path / "other.safetensors"
    weights = dict(sd_file)
    del weights[f"{first}middle_block.0.in_layers.0.weight"]
    weights[f"{first}out.2.bias"] = torch.ones(5)
    weights[f"{first}label_emb.0.0.weight"] = torch.ones(2)
    save_file(weights, file)
    with pytest.raises(KeyMismatchError, match="1 missing, 1 wrong shape, 1 unexpected") as error:
        run(options(pipeline, tmp_path / "model", unet=str(file)))
    assert "out.2.bias is 5 where unet.conv_out.bias is 4" in str(error.value)
    assert "nothing for unet.mid_block.resnets.0.norm1.weight" in str(error.value)
    (report,) = json.loads((tmp_path / "model.keys.json").read_text())
    assert report["unexpected"] == [f"{first}label_emb.0.0.weight"]
    assert not (tmp_path / "model").exists()
    for start in ("input_blocks.10", "input_blocks.0.0.weight"):
        save_file({k: v for k, v in sd_file.items() if start not in k}, file)
        with pytest.raises(CheckpointError, match=r"not of Stable Diffusion 1\.5's topology.*input_bl"):
            assemble(options(pipeline, tmp_path / "m", unet=str(file)))
    save_file({"unet.x": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"no U-Net in Stable .* \(there: unet\.x\)"):
        assemble(options(pipeline, tmp_path / "m", unet=str(file)))
    with pytest.raises(CheckpointError, match="no VAE in Stable"):
        assemble(options(pipeline, tmp_path / "m", vae=str(file)))


def test_nothing_is_overwritten_and_space_is_checked_first(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An existing folder stays; a full disk is noticed before anything is written."""
    (tmp_path / "model").mkdir()
    with pytest.raises(RunFolderError, match=r"exists\. Nothing was written"):
        run(options(pipeline, tmp_path / "model"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match=r"needs 0\.0 GiB .* 0\.0 GiB are free .* Nothing was"):
        run(options(pipeline, tmp_path / "other"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
