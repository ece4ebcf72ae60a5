"""Which rows of a batch are conditional: every recipe, with guidance, at scale 1 and where there is none to speak of,
for any number of samples, against a recorder of every attention call.

The batch of two samples without guidance is as large as that of one with it, so its size says nothing. Two images of
each prompt are twice as many rows to the denoiser: 1, 2 and 3 prompts with 1 and 2 images each are 1, 2, 3, 4 and 6
samples. Pipelines of diffusers, which multiply the rows themselves, are called with all six.
"""

import copy
import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxKontextPipeline,
    FluxTransformer2DModel,
    HeunDiscreteScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
)
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from i2am_train.attention import named_recipe, trace
from i2am_train.errors import CaptureError
from i2am_train.types import GridSize
from tests.support.ldm_cases import CASES as LDM_CASES
from tests.support.recipe_contract import STEPS, Case, Witness, assert_equal, fresh, project
from tests.support.recipe_models import CASES, CONTEXT, noise, small_vae

SAMPLES, MORE = (1, 2, 3), (4, 6)
HEAVY = {"idm_vton": 3, "ip_adapter_sdxl": 2, "ip_adapter_full_face": 3}
"""At most so many samples of models with 33 attentions or 256 reference tokens: what they have more of is not rows."""
GUIDANCE = [
    ("on", SAMPLES),
    *(
        pytest.param(*both, marks=pytest.mark.long)
        for both in (("on", MORE), ("1.0", SAMPLES + MORE), ("none", SAMPLES + MORE))
    ),
]


# ------------------------------------------------------------ callers, each in the words of the model's own code


class PropertyPipeline:
    """As diffusers: the pipeline has a property."""

    def __init__(self, case: Case, target: Any) -> None:
        self.case, self.target, self._guidance_scale = case, target, None

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    def __call__(self, samples: int, scale: float) -> None:
        self._guidance_scale = scale
        latents = torch.zeros(samples, 4, 1, 1)
        for step in range(STEPS):
            self._denoise(len(latents), step)

    def _denoise(self, samples: int, step: int) -> None:
        self.case.run(self.target, samples, step, self.do_classifier_free_guidance)


class VariablePipeline:
    """As Paint-by-Example, PASD, SeeSR, CatVTON and LaDI-VTON: a local variable of the call."""

    def __init__(self, case: Case, target: Any) -> None:
        self.case, self.target = case, target

    def __call__(self, samples: int, scale: float) -> None:
        do_classifier_free_guidance = scale > 1.0
        latents = torch.zeros(samples, 4, 1, 1)
        for step in range(STEPS):
            self.case.run(self.target, len(latents), step, do_classifier_free_guidance)


class LatentDiffusionSampler:
    """As the samplers of latent-diffusion: arguments of each step."""

    def __init__(self, case: Case, target: Any) -> None:
        self.case, self.target = case, target

    def sample(self, samples: int, scale: float) -> None:
        x = torch.zeros(samples, 4, 1, 1)
        for step in range(STEPS):
            self.p_sample(x, step, unconditional_guidance_scale=scale, unconditional_conditioning=x)

    __call__ = sample

    def p_sample(
        self, x: Tensor, step: int, unconditional_guidance_scale: float, unconditional_conditioning: Tensor
    ) -> None:  # fmt: skip
        def model_output() -> None:
            guided = unconditional_conditioning is not None and unconditional_guidance_scale != 1
            self.case.run(self.target, len(x), step, guided)

        model_output()


CALLERS = {
    **dict.fromkeys(("tryon", "idm_vton", "ootdiffusion", "ip_adapter", "ip_adapter_plus"), PropertyPipeline),
    **dict.fromkeys(("ip_adapter_full_face", "custom"), PropertyPipeline),
    **dict.fromkeys(("paint_by_example", "dci_vton_diffusers", "pasd", "pasd_light"), VariablePipeline),
    **dict.fromkeys(("seesr", "catvton", "ladi_vton"), VariablePipeline),
    **dict.fromkeys(("paint_by_example_ldm", "dci_vton", "stableviton"), LatentDiffusionSampler),
}  # fmt: skip
"""How each model's own code says it. The paper's authors' code says nothing: a wrapper around it must."""


def expected(case: Case, witness: Witness, guided: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Both column means of every layer, ``[batch, step, head, token]`` in float64, of the rows named in the case."""
    found = {}
    for site in case.sites:
        module, steps = case.modules(witness.target)[site.layer], []
        for call, batch, hidden, context in witness.seen[site.layer]:
            if (rows := case.rows(call, batch, guided)) is None:
                continue
            queries, keys = (
                project(module.get_submodule(path), given[rows])[:, list(at)].unflatten(2, (site.heads, -1))
                for path, given, at in (
                    (case.queries, hidden, site.generated), (case.keys, context, site.reference)
                )
            )  # fmt: skip
            logits = torch.einsum("bnhc,bmhc->bhnm", queries, keys) / queries.shape[-1] ** 0.5
            steps.append((logits.softmax(2).mean(3), logits.softmax(3).mean(2)))
        found[site.layer] = tuple(torch.stack(side, dim=1) for side in zip(*steps, strict=True))
    return found


@functools.cache
def model_of(name: str) -> Any:
    return fresh(next(case for case in (*CASES, *LDM_CASES) if str(case) == name))


@pytest.mark.parametrize(("guidance", "counts"), GUIDANCE)
@pytest.mark.parametrize("case", [*CASES, *LDM_CASES], ids=str)
def test_maps_are_of_the_conditional_rows(case: Case, guidance: str, counts: tuple[int, ...]) -> None:
    target = model_of(str(case))
    options = {**case.options(False), "guided": None if guidance != "none" else False}
    for samples in (count for count in counts if count <= HEAVY.get(str(case), max(MORE))):
        caller = CALLERS[case.recipe](case, target)
        recipe = named_recipe(target, case.recipe, **options)
        with Witness(case, target) as witness, trace(target, recipe) as attention, torch.no_grad():
            if guidance == "none":
                case.sample(target, samples, False)
            else:
                caller(samples, 5.0 if guidance == "on" else 1.0)
        store = attention.maps().store
        assert (store.batch, store.steps) == (samples, STEPS)
        for layer, maps in expected(case, witness, guidance == "on").items():
            assert_equal(store.layer(layer).to_generated, maps[0])
            assert_equal(store.layer(layer).to_reference, maps[1])


def test_every_recipe_has_a_caller() -> None:
    assert CALLERS.keys() == {case.recipe for case in (*CASES, *LDM_CASES)}


@pytest.mark.parametrize("name", ["ip_adapter", "ootdiffusion", "stableviton", "paint_by_example_ldm"])
def test_a_loop_that_says_nothing_is_refused_before_it_makes_an_image(name: str) -> None:
    case = next(case for case in (*CASES, *LDM_CASES) if str(case) == name)
    target = model_of(name)
    with (
        trace(target, named_recipe(target, name)),
        torch.no_grad(),
        pytest.raises(CaptureError, match=r"does not say whether it uses guidance.*rows='all'"),
    ):
        case.run(target, 2, 0, False)


# ------------------------------------------------------------ pipelines of diffusers


class Recorder:
    """Queries and keys of one attention call of a module, as torch is given them."""

    def __init__(self, module: Any, call: int) -> None:
        self.module, self.call, self.at, self.seen = module, call, -1, []

    def __enter__(self) -> "Recorder":
        self.sdpa = F.scaled_dot_product_attention

        def watch(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.at == self.call:
                self.seen.append((query, key))
            self.at += self.at >= 0
            return self.sdpa(query, key, *args, **kwargs)

        F.scaled_dot_product_attention = watch
        self.handles = [
            self.module.register_forward_pre_hook(lambda *_: setattr(self, "at", 0)),
            self.module.register_forward_hook(lambda *_: setattr(self, "at", -1)),
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        F.scaled_dot_product_attention = self.sdpa
        for handle in self.handles:
            handle.remove()

    def to_generated(self, rows: slice, calls: slice = slice(None), at: Any = (slice(None),) * 2) -> Tensor:
        """``[batch, step, head, token]`` of some rows and calls; ``at``: generated and reference tokens."""
        steps = []
        for query, key in self.seen[calls]:
            generated, reference = query[rows, :, at[0]].double(), key[rows, :, at[1]].double()
            logits = generated @ reference.mT / query.shape[-1] ** 0.5
            steps.append(logits.softmax(2).mean(3))
        return torch.stack(steps, dim=1)


LAYER = "up_blocks.1.attentions.1.transformer_blocks.0"


@functools.cache
def adapted(kind: Any) -> Any:
    """Stable Diffusion with an IP-Adapter of 4 tokens, in float32 and without its encoders."""
    unet = copy.deepcopy(model_of("ip_adapter").unet).float()
    unet.register_to_config(sample_size=64)  # inpainting pipelines compare it
    pipeline = kind(
        vae=small_vae(), text_encoder=None, tokenizer=None, unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(
    pipeline: Any,
    scale: float = 5.0,
    prompts: int = 1,
    images: int = 1,
    pictures: int = 1,
    steps: int = STEPS,
    **more: Any,
) -> Any:
    """As a user calls it, with embeddings in the place of words and of a picture, which is one for all prompts."""
    words = noise(prompts, 7, CONTEXT, seed=1).float()
    picture = noise(pictures, 1, 6, seed=2).float()
    if scale > 1:
        picture = torch.cat([torch.zeros_like(picture), picture])
    return pipeline(
        prompt_embeds=words, negative_prompt_embeds=torch.zeros_like(words), ip_adapter_image_embeds=[picture],
        height=24, width=16, guidance_scale=scale, num_images_per_prompt=images, output_type="latent",
        num_inference_steps=steps, generator=torch.Generator().manual_seed(0), **more,
    ).images  # fmt: skip


def assert_close(found: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("scale", [5.0, 1.0, 0.0])
def test_stable_diffusion(scale: float, prompts: int, images: int) -> None:
    """The issue's case: two images without guidance are a batch as even as one image with it."""
    pipeline = adapted(StableDiffusionPipeline)
    module = pipeline.unet.get_submodule(LAYER + ".attn2")
    with Recorder(module, 1) as recorder, trace(pipeline) as attention:
        made = draw(pipeline, scale, prompts, images)
    samples = prompts * images
    assert len(made) == attention.maps().store.batch == samples
    rows = slice(samples, None) if scale > 1 else slice(None)
    assert_close(attention.maps().store.layer(2).to_generated, recorder.to_generated(rows))


@functools.cache
def painter() -> Any:
    pipeline = copy.deepcopy(model_of("paint_by_example"))
    for part in (pipeline.unet, pipeline.vae, pipeline.image_encoder):
        part.float()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_paint_by_example_says_it_by_a_variable(scale: float, prompts: int, images: int) -> None:
    pipeline = painter()
    module = pipeline.unet.get_submodule("up_blocks.1.attentions.1.transformer_blocks.0.attn2")
    with Recorder(module, 0) as recorder, trace(pipeline) as attention:
        pipeline(
            image=noise(prompts, 3, 24, 16, seed=1).float().clamp(0, 1),
            mask_image=noise(prompts, 1, 24, 16, seed=2).float().clamp(0, 1),
            example_image=noise(prompts, 3, 8, 8, seed=3).float(),
            num_inference_steps=STEPS, guidance_scale=scale, num_images_per_prompt=images, output_type="latent",
        )  # fmt: skip
    samples = prompts * images
    rows = slice(samples, None) if scale > 1 else slice(None)
    right = recorder.to_generated(rows)
    found = attention.maps().store.layer(2).to_generated
    assert found.shape[:2] == (samples, STEPS)
    assert_close(found[:, 0], right[:, 0])


GRID, WORDS = GridSize(2, 3), 5


@functools.cache
def kontext() -> Any:
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=CONTEXT, pooled_projection_dim=6, axes_dims_rope=(4, 2, 2), guidance_embeds=True,
    )  # fmt: skip
    for name, weight in transformer.named_parameters():
        weight.data += 0.3 * torch.randn(weight.shape) if "norm" not in name else 0
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=(4, 4), norm_num_groups=2, latent_channels=4, shift_factor=0.1, scaling_factor=1.0,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = FluxKontextPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=vae, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=transformer.eval(),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize(("prompts", "images"), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("scale", [3.0, 1.0, None])
def test_kontext_guides_by_two_calls(scale: float | None, prompts: int, images: int) -> None:
    """True guidance, scale 1, and no negative prompt. Several images of several prompts given as embeddings are not
    possible: diffusers does not repeat those."""
    pipeline = kontext()
    recipe = named_recipe(pipeline, "flux_kontext", generated_grid=GRID, reference_grid=GRID, text_tokens=WORDS)
    embeds = {"prompt_embeds": noise(prompts, WORDS, CONTEXT, seed=1).float(),
              "pooled_prompt_embeds": noise(prompts, 6, seed=2).float()}  # fmt: skip
    if scale is not None:
        embeds |= {f"negative_{name}": -value for name, value in embeds.items()} | {"true_cfg_scale": scale}
    module = pipeline.transformer.transformer_blocks[0].attn
    with Recorder(module, 0) as recorder, trace(pipeline, recipe) as attention:
        pipeline(
            image=noise(1, 4, 4, 6, seed=3).float(), height=8, width=12, num_inference_steps=STEPS, _auto_resize=False,
            num_images_per_prompt=images, output_type="latent", max_area=96,
            generator=torch.Generator().manual_seed(0), **embeds,
        )  # fmt: skip
    store = attention.maps().store
    assert (store.batch, store.steps) == (prompts * images, STEPS)
    places = slice(WORDS, WORDS + GRID.tokens), slice(WORDS + GRID.tokens, None)
    calls = slice(None, None, 2 if scale == 3.0 else 1)
    right = recorder.to_generated(slice(None), calls, places)
    assert_close(store.layer("transformer_blocks.0").to_generated, right)


# ------------------------------------------------------------ what else a caller shows


def test_the_pipeline_that_shares_the_network_is_asked() -> None:
    """The traced pipeline ran with guidance before, and says so still; another one runs its network without."""
    pipeline = adapted(StableDiffusionPipeline)
    draw(pipeline, 5.0)
    assert pipeline.do_classifier_free_guidance
    other = StableDiffusionPipeline(**pipeline.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for traced in (pipeline, pipeline.unet):
        with trace(traced, named_recipe(traced, "ip_adapter")) as attention:
            draw(other, 1.0, images=2)
        assert attention.maps().store.batch == 2


def test_guidance_of_a_third_kind_is_refused() -> None:
    """Two images: a batch of six, of which half is neither conditional nor unconditional."""
    pipeline = adapted(StableDiffusionPAGPipeline)
    message = r"called with 6 rows for 2 samples; expected 4 with guidance"
    with trace(pipeline, named_recipe(pipeline, "ip_adapter")), pytest.raises(CaptureError, match=message):
        draw(pipeline, 5.0, images=2, pag_scale=3.0)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_second_run_is_refused(steps: int) -> None:
    """Also one of a single step, whose timestep does not rise."""
    pipeline = adapted(StableDiffusionPipeline)
    with trace(pipeline) as attention:
        draw(pipeline, 1.0, steps=steps)
        with pytest.raises(CaptureError, match="second sampling run"):
            draw(pipeline, 1.0, steps=steps)
    assert {site.calls for site in attention.sites} == {steps}


def test_references_of_other_rows_are_refused() -> None:
    """A picture for each of two prompts: diffusers repeats both twice, and cuts the four anew into rows of two."""
    pipeline = adapted(StableDiffusionPipeline)
    message = r"queries of 2 rows and keys of 4"
    with trace(pipeline), pytest.raises(CaptureError, match=message):
        draw(pipeline, 1.0, prompts=2, pictures=2)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
def test_evaluations_of_one_run_may_repeat_a_timestep() -> None:
    """Heun: two evaluations of each step but the last."""
    pipeline = adapted(StableDiffusionPipeline)
    pipeline.scheduler = HeunDiscreteScheduler()
    try:
        with trace(pipeline) as attention:
            draw(pipeline)
    finally:
        pipeline.scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    assert {site.calls for site in attention.sites} == {2 * STEPS - 1}
    assert attention.maps().store.steps == STEPS


def test_two_calls_of_a_first_step_are_no_step() -> None:
    """A loop that calls each half of guidance on its own, under a recipe that knows of none."""
    case = next(case for case in CASES if str(case) == "ip_adapter")
    target = model_of("ip_adapter")
    recipe = named_recipe(target, "ip_adapter", guided=False)
    message = r"timestep 801 after timestep 801.*unconditional calls"
    with trace(target, recipe), torch.no_grad():
        case.run(target, 2, 0, False)
        with pytest.raises(CaptureError, match=message):
            case.run(target, 2, 0, False)


def test_one_call_of_a_step_of_two_is_refused() -> None:
    case = next(case for case in LDM_CASES if str(case) == "stableviton")
    target = model_of("stableviton")
    message = r"'stableviton' expects two calls.*called once at timestep 801"
    with (
        trace(target, named_recipe(target, "stableviton", guided=True)),
        torch.no_grad(),
        pytest.raises(CaptureError, match=message),
    ):
        case.sample(target, 2, False)


def test_two_runs_of_a_model_that_is_given_no_timestep() -> None:
    """The authors' network is given an embedding of the time."""
    case = next(case for case in LDM_CASES if str(case) == "custom")
    target = model_of("custom")
    recipe = named_recipe(target, "custom", guided=False, reference_grid=GridSize(5, 3))
    with trace(target, recipe), torch.no_grad():
        case.sample(target, 2, False)
        with pytest.raises(CaptureError, match="second sampling run"):
            case.sample(target, 2, False)


def test_a_crop_is_refused_before_the_picture_is_made() -> None:
    pipeline = adapted(StableDiffusionInpaintPipeline)
    embeds = noise(1, 7, CONTEXT, seed=1).float()
    picture = torch.cat([torch.zeros(1, 1, 6), noise(1, 1, 6, seed=2).float()])
    mask = Image.new("L", (32, 48))
    mask.paste(255, (8, 8, 16, 16))

    def paint(**more: Any) -> Any:
        return pipeline(
            image=Image.new("RGB", (32, 48)), mask_image=mask, prompt_embeds=embeds, height=24, width=16, strength=1.0,
            negative_prompt_embeds=torch.zeros_like(embeds), ip_adapter_image_embeds=[picture],
            num_inference_steps=1, **more,
        )  # fmt: skip

    recipe = named_recipe(pipeline, "ip_adapter")
    with trace(pipeline, recipe), pytest.raises(CaptureError, match=r"padding_mask_crop.*cut out yourself"):
        paint(padding_mask_crop=4)
    with trace(pipeline, recipe) as attention:
        paint()
    assert attention.maps().store.batch == 1


def test_a_second_adapter_is_marked() -> None:
    """Maps of either say that the other's picture also enters."""
    target = copy.deepcopy(model_of("ip_adapter"))
    projections = target.unet.encoder_hid_proj.image_projection_layers
    projections.append(copy.deepcopy(projections[0]))
    for path, processor in target.unet.attn_processors.items():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            module = target.unet.get_submodule(path.removesuffix(".processor"))
            both = IPAdapterAttnProcessor2_0(processor.hidden_size, CONTEXT, (4, 4), [1.0, 1.0])
            module.set_processor(both.double())
    added = {"image_embeds": [noise(2, 1, 6, seed=seed) for seed in (1, 2)]}
    target = SimpleNamespace(unet=target.unet)
    for adapter in (0, 1):
        recipe = named_recipe(target, "ip_adapter", adapter=adapter)
        with trace(target, recipe, rows="all") as attention, torch.no_grad():
            sample, words = noise(2, 4, 12, 8, seed=0), noise(2, 7, CONTEXT, seed=7)
            target.unet(sample, torch.tensor(5), words, added_cond_kwargs=added)
        (mark,) = attention.maps().marks
        assert mark == "partial: the pictures of 1 other adapter also enter beside it"
