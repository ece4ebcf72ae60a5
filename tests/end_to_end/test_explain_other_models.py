"""`i2am explain` on other people's models: from saved folders and a factory to pictures, scores and the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from i2am_train.attention import load_maps
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.config.store import compose
from i2am_train.errors import CaptureError, CheckpointError, ConfigError, DataError, I2AMError
from i2am_train.evaluation.explaining import explain_picture
from i2am_train.evaluation.explanation import read_explanation
from i2am_train.models.catvton import load_attention, load_catvton
from i2am_train.models.traceable import Request, Source
from i2am_train.reporting.figures.canvas import save_figure
from i2am_train.types import Direction, GridSize
from i2am_train.workflows.explain import run
from i2am_train.workflows.report import report
from tests.support.commands import page_data
from tests.support.pipelines import tiny_catvton, tiny_ip_adapter, tiny_stable_diffusion

FACTORY = "factory=tests.support.stableviton_like"
WHERE = "not functional: with a single reference token"
QUICK = ("sampling.steps=2", "attribution.time_groups=2", "size=[64,48]")
FIGURES = ("unified", "layers", "time_heads")

Explain = Callable[..., Path]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A person with the mask of the clothes, and a garment of another aspect with its own."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, mode, size, back, shapes in (
        ("person", "RGB", (60, 80), "#c9d6df", [((18, 22, 44, 58), "#884444")]),
        ("mask", "L", (60, 80), 0, [((16, 20, 46, 60), 255)]),
        ("shirt", "RGB", (90, 70), "white", [((30, 10, 60, 60), "#2a7f62"), ((62, 10, 78, 28), "#1f5f4a")]),
        ("shirt_mask", "L", (90, 70), 0, [((30, 10, 60, 60), 255)]),
        ("black", "L", (60, 80), 0, []),
    ):
        picture = Image.new(mode, size, back)
        for box, color in shapes:
            ImageDraw.Draw(picture).rectangle(box, fill=color)
        picture.save(folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "sd")


@pytest.fixture(scope="module")
def full_face(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ip_adapter(tmp_path_factory.mktemp("full_face"), "ip_adapter_full_face")


@pytest.fixture(scope="module")
def four_tokens(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ip_adapter(tmp_path_factory.mktemp("four_tokens"), "ip_adapter")


@pytest.fixture(scope="module")
def plus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_ip_adapter(tmp_path_factory.mktemp("plus"), "ip_adapter_plus")


@pytest.fixture(scope="module")
def catvton(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_catvton(tmp_path_factory.mktemp("catvton"))


@pytest.fixture
def explain(pictures: Path, tmp_path: Path) -> Explain:
    """Runs the command on the pictures; returns its folder."""

    def call(*options: str, filling: bool = True) -> Path:
        files = [f"image={pictures / 'person.png'}", f"mask={pictures / 'mask.png'}"] if filling else []
        overrides = [*files, f"reference={pictures / 'shirt.png'}", f"output={tmp_path / 'out'}", *QUICK]
        given = {option.partition("=")[0] for option in options}
        overrides = [option for option in overrides if option.partition("=")[0] not in given]
        run(compose("explain", [*overrides, *options]))
        return tmp_path / "out"

    return call


def scores_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "scores.json").read_text()))


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        picture.load()
        return picture


def drawn(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.png")}


def test_paint_by_example_is_marked_everywhere(
    paint_by_example: Path, explain: Explain, capsys: pytest.CaptureFixture[str]
) -> None:
    """One token: maps on the image alone, and "not functional" in scores, pictures, archive, page and terminal."""
    folder = explain("model=paint_by_example", f"checkpoint={paint_by_example}")
    scores = scores_of(folder)
    assert scores["recipe"] == "paint_by_example"
    assert scores["marks"][0].startswith(WHERE)
    assert scores["functional"] is False
    assert scores["scores"]["imacs_g"] is not None
    assert "imacs_r" not in scores["scores"]
    assert len(scores["layers"]) == 9
    assert drawn(folder) == {*FIGURES}
    for name in FIGURES:
        assert opened(folder / f"{name}.png").info["Description"].startswith(WHERE)
    assert load_maps(folder / "maps.safetensors").maps.store.marks[0].startswith(WHERE)
    page = page_data(folder)
    assert page["notices"][0].startswith(WHERE)
    assert page["layers"][0]["grids"] == {"generated": [8, 6], "reference": None}
    assert WHERE in capsys.readouterr().out
    assert opened(folder / "images" / "generated.png").size == (48, 64)


def test_full_face_has_maps_on_the_part_that_the_encoder_saw(
    full_face: tuple[Path, Path], pictures: Path, explain: Explain
) -> None:
    """257 tokens: both directions, patches, a square of the reference; and the score of its mask."""
    base, adapter = full_face
    folder = explain(
        "model=ip_adapter_full_face", f"checkpoint={base}", f"adapter={adapter}", "prompt=a shirt",
        f"reference_mask={pictures / 'shirt_mask.png'}",
    )  # fmt: skip
    scores = scores_of(folder)
    assert scores["marks"] == []
    assert scores["scores"]["imacs_r"] is not None
    assert len(scores["layers"]) == 16
    assert scores["layers"][0]["reference_grid"] == [16, 16]
    assert drawn(folder) == {*FIGURES, "specific_reference", "reverse_specific"}
    page = page_data(folder)
    assert page["sizes"] == {"generated": [64, 48], "reference": [90, 90]}
    maps = load_maps(folder / "maps.safetensors").maps
    on_photo = maps.unified(Direction.GENERATED_TO_REFERENCE).on_reference(GridSize(70, 90), maps.store.canvas)
    assert (on_photo.values[0, :, :10] == 0).all()  # the encoder's crop is the square in the middle


def test_an_adapter_without_a_picture_to_fill(full_face: tuple[Path, Path], explain: Explain) -> None:
    """Text to image: no mask, no score; without guidance all rows are conditional."""
    base, adapter = full_face
    folder = explain(
        "model=ip_adapter_full_face", f"checkpoint={base}", f"adapter={adapter}",
        "sampling.guidance=1", filling=False,
    )  # fmt: skip
    assert scores_of(folder)["scores"] == {}
    assert not (folder / "masks").exists()


def test_resampled_tokens_have_maps_on_the_generated_picture_alone(plus: tuple[Path, Path], explain: Explain) -> None:
    """16 tokens of a ``.bin`` file: functional, the score of the filled region, and nothing on the reference."""
    base, adapter = plus
    folder = explain("model=ip_adapter_plus", f"checkpoint={base}", f"adapter={adapter}")
    scores = scores_of(folder)
    assert (scores["recipe"], scores["model"]) == ("ip_adapter_plus", "IP-Adapter plus")
    assert (scores["functional"], scores["marks"]) == (True, [])
    assert scores["directions"] == ["reference_to_generated"]
    assert len(scores["layers"]) == 16
    assert scores["scores"]["imacs_g"] is not None
    assert "imacs_r" not in scores["scores"]
    assert drawn(folder) == {*FIGURES}
    assert page_data(folder)["layers"][0]["grids"] == {"generated": [32, 24], "reference": None}


def test_patches_of_tokens_without_a_place_are_refused(
    four_tokens: tuple[Path, Path], explain: Explain, tmp_path: Path
) -> None:
    """Passed over, they would look as if they had been drawn."""
    base, adapter = four_tokens
    with pytest.raises(ConfigError, match=r"reference_patches= asks for maps between patches"):
        explain(
            "model=ip_adapter", f"checkpoint={base}", f"adapter={adapter}",
            "reference_patches=[[1,1]]", filling=False,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ip_adapter", "ip_adapter_plus"])
def test_maps_of_the_command_are_those_of_the_adapter_in_diffusers(
    name: str, explain: Explain, pictures: Path, request: pytest.FixtureRequest
) -> None:
    """Queries and keys of the conditional row, computed anew inside the attention of diffusers' own pipeline."""
    base, adapter = request.getfixturevalue({"ip_adapter": "four_tokens"}.get(name, "plus"))
    folder = explain(
        f"model={name}", f"checkpoint={base}", f"adapter={adapter}", "prompt=a shirt",
        "sampling.guidance=3", "sampling.seed=7", filling=False,
    )  # fmt: skip
    picture, expected = made_by_diffusers(base, adapter, pictures / "shirt.png")
    np.testing.assert_array_equal(opened(folder / "images" / "generated.png"), picture)
    store = load_maps(folder / "maps.safetensors").maps.store
    assert set(store.names) == set(expected)
    for layer, steps in expected.items():
        found = store.layer(layer).to_generated[0]
        torch.testing.assert_close(found, torch.stack(steps), rtol=1e-4, atol=1e-7)


def made_by_diffusers(base: Path, adapter: Path, reference: Path) -> tuple[Image.Image, dict[str, list[torch.Tensor]]]:
    """The picture, and ``[head, generated]`` of each layer and step from what its attention is called with."""
    from diffusers import StableDiffusionPipeline
    from diffusers.models.attention_processor import Attention
    from transformers import CLIPVisionModelWithProjection

    encoder = CLIPVisionModelWithProjection.from_pretrained(adapter.parent / "image_encoder")
    pipeline = StableDiffusionPipeline.from_pretrained(base, image_encoder=encoder)
    pipeline.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name)
    pipeline.set_progress_bar_config(disable=True)
    found: dict[str, list[torch.Tensor]] = {}

    def note(layer: str, module: Attention, args: Any, kwargs: Any) -> None:
        _, (tokens,) = kwargs["encoder_hidden_states"]
        queries, keys = module.to_q(args[0][1]), module.processor.to_k_ip[0](tokens[1, 0])
        pairs = zip(queries.chunk(module.heads, -1), keys.chunk(module.heads, -1), strict=True)
        heads = [(q @ k.mT / q.shape[-1] ** 0.5).softmax(dim=0).mean(dim=1) for q, k in pairs]
        found.setdefault(layer, []).append(torch.stack(heads))

    for path, module in pipeline.unet.named_modules():
        if path.endswith(".attn2"):
            layer = path.removesuffix(".attn2")
            module.register_forward_pre_hook(partial(note, layer), with_kwargs=True)
    made = pipeline(
        "a shirt", ip_adapter_image=opened(reference), height=64, width=48, num_inference_steps=2,
        guidance_scale=3, generator=torch.Generator().manual_seed(7),
    )  # fmt: skip
    return made.images[0], found


def test_catvton_reports_the_share_of_attention(catvton: tuple[Path, Path], explain: Explain) -> None:
    """Self-attention over both pictures: a mass map and its mean; the paper's layer 2 by its depth."""
    base, attention = catvton
    folder = explain("model=catvton", f"checkpoint={base}", f"adapter={attention}")
    scores = scores_of(folder)
    assert len(scores["layers"]) == 16
    assert 0.2 < scores["mass"] < 0.8
    mass = load_maps(folder / "maps.safetensors").maps.mass().values
    assert scores["mass"] == pytest.approx(float(mass.mean()))
    assert scores["layer"] == "up_blocks.1.attentions.1.transformer_blocks.0"
    assert drawn(folder) == {*FIGURES, "mass", "specific_reference", "reverse_specific"}
    assert "of the attention goes to the reference" in page_data(folder)["notices"][0]


@pytest.mark.parametrize("side_by_side", [False, True])
def test_catvton_is_as_if_untraced_on_either_canvas(catvton: tuple[Path, Path], side_by_side: bool) -> None:
    """Halves of the canvas have the person's grid, guidance acts, and looking changes no pixel."""
    base, attention = catvton
    options = {"side_by_side": side_by_side}
    source = Source(model="catvton", checkpoint=str(base), adapter=attention, options=options)
    model = load_catvton(source)
    picture = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    mask = np.zeros((40, 30), np.bool_)
    mask[10:30, 5:20] = True
    request = Request(
        reference=picture[::-1, :20], image=picture, mask=mask, size=GridSize(64, 48), steps=2,
        guidance=2.5, seed=0,
    )  # fmt: skip
    attribution = AttributionConfig(layer=2, time_groups=2, layers=[2, 8])
    numbered = r"No attention layer is called 'which'.* up_blocks\.1\.attentions\.0\.transformer_blocks\.0 \(1\), "
    with pytest.raises(CaptureError, match=numbered):
        explain_picture(model, request, AttributionConfig(time_groups=2, layer="which"))
    made = explain_picture(model, request, attribution)
    generated = made.images["generated"]
    np.testing.assert_array_equal(generated, model.make(request))
    grids = [(layer.generated_grid, layer.reference_grid) for layer in made.maps.store.layers]
    assert grids == [(GridSize(8, 6),) * 2, (GridSize(32, 24),) * 2]
    unguided = replace(request, guidance=1.0)
    assert (model.make(unguided) != generated).any()


@pytest.mark.parametrize("stride", [7, 8])
def test_attention_weights_are_found_by_their_numbers(tmp_path: Path, stride: int) -> None:
    """Each self-attention gets its own weights, however many parts the authors' library counted."""
    from diffusers import UNet2DConditionModel
    from safetensors.torch import load_file

    base, file = tiny_catvton(tmp_path, stride)
    unet, weights = UNet2DConditionModel.from_pretrained(base, subfolder="unet"), load_file(file)
    load_attention(unet, weights)
    layers = [layer for path, layer in unet.named_modules() if path.endswith(".attn1")]
    for number, layer in enumerate(layers):
        assert torch.equal(layer.to_k.weight, weights[f"{stride * number}.to_k.weight"])
    del weights[f"{stride}.to_q.weight"]
    with pytest.raises(CheckpointError, match=r"of 15 self-attentions, and the U-Net has 16"):
        load_attention(unet, weights)


def test_a_factory_brings_a_model_of_its_own_repository(explain: Explain) -> None:
    """As the README shows it for StableVITON: found by its modules, nine warping blocks, both directions."""
    folder = explain("model=factory", f"{FACTORY}:build")
    scores = scores_of(folder)
    assert scores["recipe"] == "stableviton"
    assert scores["model"] == "StableVITON"
    assert [layer["generated_grid"] for layer in scores["layers"]][::3] == [[4, 3], [8, 6], [16, 12]]
    assert scores["layer"] == "warp_flow_blks.1"
    assert {"specific_reference", "reverse_specific"} < drawn(folder)


def test_other_models_come_back_and_are_reported(explain: Explain, pictures: Path, tmp_path: Path) -> None:
    """Their folders are read as those of try-on models are; figures that need a dataset's sample are left out."""
    mask = f"reference_mask={pictures / 'shirt_mask.png'}"
    folder = explain("model=factory", f"{FACTORY}:build", mask)
    one = read_explanation(folder)
    assert (one.name, one.model, one.reference) == ("person-shirt", "StableVITON", "reference")
    assert np.array_equal(one.images["reference"], opened(pictures / "shirt.png"))
    assert one.scores == scores_of(folder)["scores"]
    assert one.masks["inpaint"].shape == one.size
    made = report(compose("report", [f"explained=[{folder}]", f"output={tmp_path / 'report'}"]))
    index = json.loads((made / "index.json").read_text())
    drawn = {entry["figure"] for entry in index["figures"]}
    assert {"layers", "time_heads", "specific_reference", "two_axis"} <= drawn
    assert {"scores", "flow", "refinement", "guidance", "unpaired"} <= set(index["left_out"])


def test_a_partial_model_is_marked_everywhere(
    explain: Explain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garment's other way into the picture is named in scores, archive, page, terminal, and on every figure."""
    words: dict[str, list[str]] = {}

    def noted(figure: Figure, path: Path, **options: Any) -> None:
        words[path.stem] = [text.get_text().replace("\n", " ") for text in figure.texts]
        save_figure(figure, path, **options)

    monkeypatch.setattr("i2am_train.workflows.explain.save_figure", noted)
    folder = explain("model=factory", f"{FACTORY}:build")
    way = "a CLIP embedding of the garment also enters by cross-attention"
    scores = scores_of(folder)
    assert (scores["partial"], scores["marks"]) == (way, [f"partial: {way}"])
    assert load_maps(folder / "maps.safetensors").maps.marks == (f"partial: {way}",)
    assert page_data(folder)["notices"] == [f"partial: {way}"]
    assert f"partial: {way}" in capsys.readouterr().out.splitlines()
    assert drawn(folder) == {*FIGURES, "specific_reference", "reverse_specific"} == words.keys()
    for name, texts in words.items():
        assert f"partial: {way}" in texts
        assert opened(folder / f"{name}.png").info["Description"] == f"partial: {way}"


def test_factory_modules_are_found_in_the_working_directory(
    explain: Explain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file beside the command is enough, and it may name the recipe."""
    (tmp_path / "my_own_model.py").write_text(
        "from tests.support.stableviton_like import build as other\n"
        "def build(checkpoint, device):\n    return other(checkpoint, device), 'stableviton'\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert scores_of(explain("model=factory", "factory=my_own_model:build"))["recipe"] == "stableviton"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (["model=paint_by_exampel"], ConfigError, "Did you mean 'paint_by_example'"),
        (["model=stableviton"], ConfigError, r"its own repository's code.*model=factory"),
        (["model=paint_by_example", "mask={p}/shirt_mask.png"], DataError, r"70x90 .* and image= is 80x60"),
        (["model=paint_by_example", "mask={p}/black.png"], DataError, "no white pixel"),
        (["model=paint_by_example", "image={p}/none.png"], DataError, r"no file .*none\.png.*image=FILE"),
        (["model=paint_by_example", "image=null"], ConfigError, r"image= was not given"),
        (["model=paint_by_example", "prompt=red"], ConfigError, r"prompt= means nothing to model=paint"),
        (["model=paint_by_example"], CheckpointError, r"StableDiffusionPipeline; .* PaintByExamplePipeline"),
        (["model=catvton"], CheckpointError, r"takes 4 channels; .* inpainting network of 9"),
        (["model=ip_adapter"], ConfigError, r"adapter= was not given"),
        (["model=ip_adapter", "adapter={p}/none.bin"], CheckpointError, r"Neither the pipeline nor .* image_encoder"),
        (["model=factory"], ConfigError, r"factory= was not given"),
        (["model=factory", "factory=none.such:build"], ConfigError, r"cannot be imported: \w+: No module named 'none'"),
        (["model=factory", f"{FACTORY}:bild"], ConfigError, r"has no 'bild' \(it has: build"),
        (["model=factory", "factory=nothing"], ConfigError, r"expected package\.module:name"),
        (["model=factory", f"{FACTORY}:build_nothing"], ConfigError, r"which cannot be called"),
        (["model=factory", f"{FACTORY}:build_deaf"], ConfigError, r"called with \(image="),
        (["model=factory", f"{FACTORY}:build_unknown"], CaptureError, r"No recipe is known"),
        (
            ["model=factory", f"{FACTORY}:build", "recipe=paint_by_example"],
            CaptureError, r"StableVITON has no part .unet.",
        ),
        (["model=tryon"], ConfigError, r"image=\.\.\. is for other people's models"),
        (["model=factory", "factory=a:b", "sample=3"], ConfigError, r"sample=3 counts samples of a dataset"),
        (["model=catvton", "sampling.sampler=unipc"], ConfigError, r"scheduler of its own folder"),
        (["model=catvton", "sampling.precision=bf16-mixed"], ConfigError, r"precision=bf16-mixed is for model=tryon"),
        (["model=catvton", "attribution.time_groups=5"], I2AMError, r"takes 4 channels|time.groups"),
    ],
)  # fmt: skip
def test_bad_input_is_named_and_nothing_is_written(
    options: list[str],
    error: type[I2AMError],
    message: str,
    stable_diffusion: Path,
    pictures: Path,
    explain: Explain,
    tmp_path: Path,
) -> None:
    """What was found, what was expected, what to do; before a folder is made."""
    options = [option.format(p=pictures) for option in options]
    with pytest.raises(error, match=message):
        explain(f"checkpoint={stable_diffusion}", *options)
    assert not (tmp_path / "out").exists()


def test_misfitting_sizes_and_adapters(full_face: tuple[Path, Path], paint_by_example: Path, explain: Explain) -> None:
    """A side that the networks cannot halve, an adapter of another kind, a file without adapter, another folder."""
    base, adapter = full_face
    with pytest.raises(ConfigError, match=r"size=60x48 .* multiples of 16"):
        explain("model=paint_by_example", f"checkpoint={paint_by_example}", "size=[60,48]")
    with pytest.raises(CheckpointError, match=r"is ip_adapter_full_face, and model=ip_adapter was asked for"):
        explain("model=ip_adapter", f"checkpoint={base}", f"adapter={adapter}")
    with pytest.raises(CheckpointError, match=r"reads image features of 48 channels.*gives 32\. Put"):
        explain("model=ip_adapter_full_face", f"checkpoint={base}", f"adapter={for_wider_encoder(adapter)}")
    encoder = adapter.parent / "image_encoder" / "model.safetensors"
    with pytest.raises(CheckpointError, match=r"adapter=.* does not fit this model"):
        explain("model=ip_adapter", f"checkpoint={base}", f"adapter={encoder}")
    index = json.loads((base / "model_index.json").read_text())
    sdxl = base.parent / "sdxl"
    sdxl.mkdir(exist_ok=True)
    (sdxl / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionXLPipeline"}))
    with pytest.raises(CheckpointError, match=r"is of a StableDiffusionXLPipeline; .* StableDiffusionPipeline or"):
        explain("model=ip_adapter", f"checkpoint={sdxl}", f"adapter={adapter}")


def for_wider_encoder(adapter: Path) -> Path:
    """The file of a full-face adapter that reads 48 channels."""
    from safetensors.torch import load_file, save_file

    weights = load_file(adapter)
    name, wide = "image_proj.proj.{}.{}", 48
    weights[name.format(0, "weight")] = torch.zeros(wide, wide)
    weights[name.format(0, "bias")] = torch.zeros(wide)
    weights[name.format(2, "weight")] = torch.zeros(16, wide)
    save_file(weights, adapter.parent / "wider.safetensors")
    return adapter.parent / "wider.safetensors"
