"""What a recipe says of its model: how it is recognised, what its maps mean, and what it refuses."""

import copy
import dataclasses
import functools
from types import SimpleNamespace

import pytest
import torch

from i2am_train.attention import (
    KnownModel,
    Recipe,
    Site,
    Tokens,
    detect_recipe,
    diffusers_decoder,
    known_models,
    named_recipe,
    register,
    trace,
)
from i2am_train.attention import known as recipes_module
from i2am_train.attention.known import KNOWN_MODELS
from i2am_train.config.explanation import RecipeConfig
from i2am_train.config.store import compose
from i2am_train.errors import CaptureError, ConfigError
from i2am_train.types import Canvas, GridSize
from tests.support.ldm_cases import CASES as LDM_CASES
from tests.support.ldm_cases import CONTEXT as LDM_CONTEXT
from tests.support.ldm_cases import LATENT as LDM_LATENT
from tests.support.recipe_contract import G2R, R2G, Case, fresh, recipe_of, traced_run, wrap_in_compile
from tests.support.recipe_models import CASES, CONTEXT, SDXL, TIMESTEPS, evaluate, make_unet, noise

BY_NAME = {str(case): case for case in CASES}
PARTIAL = {"pasd", "pasd_light", "seesr", "idm_vton", "ootdiffusion", "ladi_vton"}


@functools.cache
def maps_of(name):
    case = BY_NAME[name]
    return traced_run(case, fresh(case), 2, True).maps()


def traced(target, recipe, *evaluations):
    """Evaluations inside a trace, for those that it refuses."""
    with trace(target, recipe), torch.no_grad():
        for evaluation in evaluations:
            evaluation()


class TestRecognition:
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_each_model_is_recognised_by_its_modules(self, case: Case):
        # without a name, among all the others
        target = fresh(case)
        found = detect_recipe(target)
        assert found.name == case.recipe
        assert found.root == case.root
        assert found.sites == named_recipe(target, case.recipe).sites

    @pytest.mark.parametrize("name", ["ip_adapter_plus", "catvton", "paint_by_example"])
    def test_a_compiled_network_is_recognised(self, name: str):
        # by paths, classes and the pipeline's own class; the compiler's wrapper hides none
        target = fresh(BY_NAME[name])
        wrap_in_compile(BY_NAME[name], target)
        assert detect_recipe(target).name == name

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_the_denoiser_alone_may_be_traced(self, case: Case):
        # what has no place of its own name is the root itself
        if case.recipe == "tryon":
            pytest.skip("its recipe reads the pipeline")
        assert named_recipe(case.denoiser(fresh(case)), case.recipe).root == ""

    def test_a_plain_network_is_not_taken_for_any(self):
        # SD1.5, an inpainting network and SDXL are nobody's model
        for changes in ({}, {"in_channels": 9}, SDXL):
            with pytest.raises(CaptureError, match=r"No recipe is known for SimpleNamespace"):
                detect_recipe(SimpleNamespace(unet=make_unet(**changes)))

    def test_a_model_of_ones_own_comes_first(self, monkeypatch):
        monkeypatch.setattr(recipes_module, "_REGISTERED", [])

        def mine() -> Recipe:
            return Recipe("unet", (Site(r".*\.attn2", reference=Tokens(None)),), name="mine")

        known = {"title": "Mine", "sites": "", "grids": "", "licence": "", "loading": ""}
        signature = recipes_module.Signature(channels=31)
        register(KnownModel(mine, signature=signature, **known))
        assert detect_recipe(fresh(BY_NAME["ladi_vton"])).name == "mine"
        assert known_models()[0].name == "mine"
        with pytest.raises(CaptureError, match="shipped recipe called 'pasd'"):
            register(KnownModel(recipes_module.pasd, **known))

    def test_unknown_names_and_options_say_what_there_is(self):
        target = fresh(BY_NAME["ladi_vton"])
        with pytest.raises(CaptureError, match=r"No recipe is called 'ladi'.*ladi_vton"):
            named_recipe(target, "ladi")
        with pytest.raises(CaptureError, match=r"no option 'grid'. It has: first, count, guided"):
            named_recipe(target, "ladi_vton", grid=3)


class TestMeaning:
    @pytest.mark.parametrize("name", sorted(BY_NAME))
    def test_marks(self, name):
        # "partial" where the garment also enters by other ways, "not functional" with one token
        maps = maps_of(name)
        kinds = {mark.partition(":")[0] for mark in maps.marks}
        expected = {"partial"} if name in PARTIAL else set()
        assert kinds == expected | ({"not functional"} if name == "paint_by_example" else set())
        assert maps.store.recipe == BY_NAME[name].recipe

    @pytest.mark.parametrize("name", ["idm_vton", "ootdiffusion", "catvton"])
    def test_share_of_the_reference(self, name):
        # strictly between none and all, and not the same everywhere
        mass = maps_of(name).mass()
        assert mass.values.min() > 0
        assert mass.values.max() < 1
        assert mass.values.std() > 1e-3

    def test_no_share_where_there_is_nothing_but_the_reference(self):
        with pytest.raises(CaptureError, match="attends to the reference alone"):
            maps_of("pasd").mass()

    @pytest.mark.parametrize("name", ["ladi_vton", "paint_by_example", "ip_adapter", "ip_adapter_plus"])
    def test_tokens_without_a_place_have_no_map_on_the_reference(self, name):
        maps = maps_of(name)
        assert maps.unified(R2G).values.shape == (2, 12, 8)
        with pytest.raises(CaptureError, match=r"no place in the reference picture.*words"):
            maps.unified(G2R)

    def test_heads_are_grouped_where_levels_differ_in_them(self):
        # SeeSR: 20, 10 and 5 heads
        maps = maps_of("seesr")
        with pytest.raises(ConfigError, match=r"different numbers of heads \(5, 10, 20\)"):
            maps.head_level(R2G)
        groups = {count: part.head_level(R2G) for count, part in maps.by_head_count().items()}
        assert {count: part.values.shape[1] for count, part in groups.items()} == {5: 5, 10: 10, 20: 20}
        assert groups[20].grid == GridSize(3, 2)

    def test_canvases(self):
        # which part of the reference picture the maps lie on
        canvases = {known.name: known.made().canvas for known in KNOWN_MODELS}
        assert canvases.pop("catvton") is Canvas.LETTERBOX
        assert canvases.pop("ip_adapter_full_face") is Canvas.CENTRE_CROP
        assert set(canvases.values()) == {Canvas.STRETCH}

    def test_queries_and_keys_of_one_token_cannot_move_the_image(self):
        # the reason for "not functional": other projections, the same output
        target = fresh(BY_NAME["paint_by_example"])
        with torch.no_grad():
            before = evaluate(target.unet, 2, 0, tokens=1)
            for name, weight in target.unet.named_parameters():
                if "attn2.to_q" in name or "attn2.to_k" in name:
                    weight.neg_().mul_(3)
            assert torch.equal(evaluate(target.unet, 2, 0, tokens=1), before)


class TestPaintByExamplePipeline:
    def test_a_whole_sampling_run(self):
        # PNDM: n + 1 evaluations, one timestep twice, n steps; the image is not changed
        pipeline = copy.deepcopy(fresh(BY_NAME["paint_by_example"]))
        for part in (pipeline.unet, pipeline.vae, pipeline.image_encoder):
            part.float()
        pipeline.set_progress_bar_config(disable=True)
        pictures = {
            name: noise(1, channels, 24, 16, seed=3).float().clamp(0, 1)
            for name, channels in (("image", 3), ("mask_image", 1))
        }
        pictures |= {"example_image": noise(1, 3, 8, 8, seed=4).float()}

        def draw():
            generator = torch.Generator().manual_seed(0)
            return pipeline(**pictures, num_inference_steps=4, generator=generator, output_type="np").images

        before = draw()
        with trace(pipeline) as attention:
            during = draw()
        assert (before == during).all()
        assert {site.calls for site in attention.sites} == {5}
        store = attention.maps().store
        assert (store.steps, store.batch, store.timesteps) == (4, 1, (750.0, 500.0, 250.0, 0.0))
        assert not store.functional


class TestIPAdapter:
    @staticmethod
    def evaluation(target, *image, **options):
        """Two reference pictures per sample."""
        added = {"image_embeds": [noise(2, 2, *image, seed=9)]}
        return lambda: evaluate(target.unet, 2, 0, added_cond_kwargs=added, **options)

    def test_several_pictures_share_a_softmax(self):
        case = BY_NAME["ip_adapter"]
        target = fresh(case)
        with trace(target, recipe_of(case, target, False)) as attention, torch.no_grad():
            self.evaluation(target, 6)()
        assert {site.reference_tokens for site in attention.sites} == {2 * 4}

    def test_several_pictures_with_masks_have_a_softmax_each(self):
        case = BY_NAME["ip_adapter"]
        target = fresh(case)
        masks = {"ip_adapter_masks": [torch.ones(1, 2, 12, 8).double()]}
        masked = self.evaluation(target, 6, cross_attention_kwargs=masks)
        with pytest.raises(CaptureError, match=r"under a mask \(ip_adapter_masks\)"):
            traced(target, recipe_of(case, target, False), masked)

    def test_faces_of_two_pictures_do_not_fit_one_grid(self):
        case = BY_NAME["ip_adapter_full_face"]
        target = fresh(case)
        message = r"513 tokens \(without the special ones\) do not fill a grid of 16x16"
        with pytest.raises(CaptureError, match=message):
            traced(target, recipe_of(case, target, False), self.evaluation(target, 257, 6))


class TestRefusals:
    """Each says what was found, what was expected and what to do."""

    @pytest.mark.parametrize(("name", "other"), [("pasd", "seesr"), ("seesr", "pasd")])
    def test_no_site_names_the_nearest_recipe(self, name, other):
        target = fresh(BY_NAME[name])
        message = rf"No attention layer matches .*up_blocks.*nearest known recipe is '{name}'"
        with pytest.raises(CaptureError, match=message):
            traced(target, other)

    def test_the_nearest_recipe_of_an_unknown_network(self):
        target = SimpleNamespace(unet=make_unet())
        with pytest.raises(CaptureError, match=r"has: .*attn1.*nearest known recipe is 'tryon'"):
            traced(target, "pasd")

    @pytest.mark.parametrize("name", ["idm_vton", "ip_adapter_sdxl"])
    @pytest.mark.parametrize("recipe", ["tryon_like", "paint_by_example", "ladi_vton"])
    def test_sdxl_given_to_a_recipe_for_sd15(self, name, recipe):
        own = diffusers_decoder(GridSize(5, 4)) if recipe == "tryon_like" else recipe
        message = r"has a module 'up_blocks.0.attentions.0.transformer_blocks.1'.*SDXL.*--recipes"
        with pytest.raises(CaptureError, match=message):
            traced(fresh(BY_NAME[name]), own)

    def test_fused_projections(self):
        # self-attention has one fused projection in place of three
        target = SimpleNamespace(unet=make_unet(in_channels=9))
        target.unet.fuse_qkv_projections()
        with pytest.raises(CaptureError, match=r"fused projections.*unfuse_qkv_projections\(\)"):
            traced(target, "catvton")

    def test_a_canvas_that_a_level_does_not_halve(self):
        # 24x8 latents: 3x1 in the middle, whose upper half ends inside a cell
        case = BY_NAME["catvton"]
        target = fresh(case)
        message = r"Layer mid_block.*grid of 3x1 .*cuts through cells.*halves evenly"
        with pytest.raises(CaptureError, match=message):
            traced(
                target,
                recipe_of(case, target, False),
                lambda: target.unet(noise(2, 9, 24, 8, seed=0), torch.tensor(1), None),
            )

    def test_the_garment_is_missing_in_a_doubled_sequence(self):
        # the plain network of OOTDiffusion, whose blocks do not append the garment
        target = SimpleNamespace(unet_vton=make_unet(in_channels=8))
        recipe = named_recipe(target, "ootdiffusion", guided=False)
        with pytest.raises(CaptureError, match=r"down_blocks.*tokens does not fit a latent"):
            traced(target, recipe, lambda: evaluate(target.unet_vton, 2, 0))

    @pytest.mark.parametrize("name", ["pasd", "seesr"])
    def test_tiles(self, name):
        # large pictures: several evaluations at one timestep, each on a part of the picture
        case = BY_NAME[name]
        target = fresh(case)
        tile = functools.partial(case.run, target, 2, 0, True)
        with pytest.raises(CaptureError, match=rf"twice at timestep 801.*{name} cuts .*tiling off"):
            traced(target, recipe_of(case, target, True), tile, tile)

    @pytest.mark.parametrize("name", ["paint_by_example_ldm", "dci_vton", "paint_by_example"])
    def test_words_in_the_place_of_a_picture_s_token(self, name):
        # Stable Diffusion's inpainting network has Paint-by-Example's modules, and attends to text
        case = {**BY_NAME, **{str(case): case for case in LDM_CASES}}[name]
        target = fresh(case)
        message = r"77 reference tokens are left of 77, and a model of this recipe has 1"

        def with_words():
            if name == "paint_by_example":
                return evaluate(target.unet, 2, 0, tokens=77)
            words, latent = noise(2, 77, LDM_CONTEXT, seed=7), noise(2, 9, *LDM_LATENT, seed=0)
            return target.predict(latent, torch.full((2,), 801), words, False)

        with pytest.raises(CaptureError, match=message):
            traced(target, recipe_of(case, target, False), with_words)

    def test_fewer_words_than_pseudo_words(self):
        case = BY_NAME["ladi_vton"]
        target = fresh(case)
        with pytest.raises(CaptureError, match=r"9 reference tokens are left of 20.*has 16"):
            traced(target, recipe_of(case, target, False), lambda: evaluate(target.unet, 2, 0, tokens=20))

    def test_numbers_mean_the_same_depth_of_an_adapter_s_decoder(self):
        case = BY_NAME["ip_adapter"]
        target = fresh(case)
        recipe = recipe_of(case, target, False)
        with trace(target, recipe, layers=[2, 9], matrix_layers=[9]) as attention, torch.no_grad():
            case.run(target, 2, 0, False)
        maps = attention.maps()
        second, ninth = "up_blocks.1.attentions.1", "up_blocks.3.attentions.2"
        assert set(maps.layers) == {f"{name}.transformer_blocks.0" for name in (second, ninth)}
        assert maps.store.layer(2).layer.startswith(second)
        assert maps.scores(9).shape == (2, 96, 4)
        for layer, message in ((5, "No attention layer is called"), (10, "no layer number 10")):
            with pytest.raises(CaptureError, match=message):
                maps.store.layer(layer)

    def test_moved_to_another_device_while_traced(self):
        target = fresh(BY_NAME["ladi_vton"])

        def on_meta():
            target.unet.to("meta")
            sample, context = noise(2, 31, 12, 8, seed=0), noise(2, 77, CONTEXT, seed=0)
            target.unet(sample.to("meta"), TIMESTEPS[1], context.to("meta"))

        with pytest.raises(CaptureError, match=r"moved from cpu to meta.*before entering"):
            traced(
                target,
                named_recipe(target, "ladi_vton", guided=False),
                lambda: evaluate(target.unet, 2, 0, tokens=77),
                on_meta,
            )

    def test_tracing_twice(self):
        target = fresh(BY_NAME["pasd"])
        with pytest.raises(CaptureError, match=r"already has a trace attached. Leave"):
            traced(target, "pasd", lambda: traced(target, "pasd"))

    def test_guidance_by_a_recipe_without_it_is_seen_in_the_rows(self):
        case = BY_NAME["pasd"]
        target = fresh(case)
        with pytest.raises(CaptureError, match=r"called with 3 rows.*rows='all'"):
            traced(target, recipe_of(case, target, True), lambda: case.run(target, 3, 0, False))


def test_every_row_of_the_support_table_is_proven() -> None:
    """Each shipped recipe has a case in the contract; Flux is compared in the tests of the second backend."""
    proven = {case.recipe for case in (*CASES, *LDM_CASES)}
    assert {known.name for known in KNOWN_MODELS} == proven | {"flux_kontext"}


CHOSEN = {
    "guided": ("false", False),
    "side_by_side": ("true", True),
    "first": ("3", 3),
    "count": ("4", 4),
    "adapter": ("1", 1),
    "reference_grid": ("[5,4]", GridSize(5, 4)),
    "generated_grid": ("[6,4]", GridSize(6, 4)),
    "special_tokens": ("2", 2),
    "text_tokens": ("7", 7),
    "rows": ("first_half", "first_half"),
}
"""Options of recipes as they are written in configuration, and what a recipe must be given."""


class TestOptionsByConfiguration:
    """``i2am explain recipe_options.NAME=VALUE`` offers what the recipes have, and nothing else."""

    @pytest.mark.parametrize("known", KNOWN_MODELS, ids=lambda known: known.name)
    def test_every_option_of_a_shipped_recipe_can_be_chosen(self, known: KnownModel):
        chosen = [f"recipe_options.{name}={CHOSEN[name][0]}" for name in known.options]
        config = compose("explain", ["model=factory", "factory=a:b", "reference=a.png", *chosen])
        recipe = known.made(**config.recipe_options.given)
        expected = known.recipe(**{name: CHOSEN[name][1] for name in known.options})
        assert (recipe.sites, recipe.rows) == (expected.sites, expected.rows)

    def test_no_option_is_offered_that_no_recipe_has(self):
        used = {name for known in KNOWN_MODELS for name in known.options}
        assert {item.name for item in dataclasses.fields(RecipeConfig)} == used == CHOSEN.keys()

    @pytest.mark.parametrize(
        ("option", "value", "least"),
        [("count", 0, 1), ("first", -1, 0), ("adapter", -1, 0), ("reference_grid", [4, 0], 1)],
    )
    def test_numbers_that_no_sequence_has(self, option: str, value: object, least: int):
        with pytest.raises(ConfigError, match=rf"recipe_options.{option}.*at least {least}"):
            compose("explain", ["model=factory", "factory=a:b", "reference=a.png", f"recipe_options.{option}={value}"])
