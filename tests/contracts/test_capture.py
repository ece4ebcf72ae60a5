"""Demands on every capture: the image does not change, nothing stays attached, and misfits are errors."""

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel

from i2am_train.attention import Recipe, ScoreTap, Site, Tokens, announce, diffusers_decoder, guard_hooks, trace
from i2am_train.errors import CaptureError
from i2am_train.models.sampling import sample
from i2am_train.types import Direction, GridSize
from tests.support.lora import add_lora

BATCH, LATENT, REFERENCE, CONTEXT = 3, GridSize(24, 16), GridSize(5, 4), 10


def make_unet():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=tuple(LATENT),
        in_channels=12,
        out_channels=4,
        block_out_channels=(8, 8, 16, 16),
        attention_head_dim=(1, 1, 2, 2),
        cross_attention_dim=CONTEXT,
        norm_num_groups=4,
        layers_per_block=2,
    )
    return unet.eval()


@pytest.fixture(scope="module")
def shared_unet():
    return make_unet()


@pytest.fixture
def unet(shared_unet):
    return copy.deepcopy(shared_unet)


def inputs(batch=BATCH, latent=LATENT, tokens=REFERENCE.tokens, seed=1, timestep=500):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, 12, *latent, generator=generator),
        torch.tensor(timestep),
        torch.randn(batch, tokens, CONTEXT, generator=generator),
    )


def recipe(**options):
    return diffusers_decoder(REFERENCE, **{"root": "", "rows": "all", **options})


def run(unet, **options):
    with torch.no_grad():
        return unet(*inputs(**options)).sample


def hook_count(model):
    """And compiled calls that something stands around."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_forward_hooks_always_called")
    calls = [module._compiled_call_impl for module in model.modules() if module._compiled_call_impl is not None]
    surrounded = sum(not hasattr(call, "_torchdynamo_orig_callable") for call in calls)
    return surrounded + sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def add_slicing(unet):
    unet.set_attention_slice(1)
    return unet


def compile_it(unet):
    unet.up_blocks[2].attentions[0].compile(backend="eager")  # a region: the whole network takes long
    run(unet)
    return unet


def compile_and_guard(unet):
    guard_hooks()
    return compile_it(unet)


VARIANTS = {
    "plain": lambda unet: unet, "lora": add_lora, "sliced": add_slicing, "compiled": compile_it,
    "compiled, hooks guarded": compile_and_guard,
}  # fmt: skip


@pytest.fixture(scope="module", params=list(VARIANTS))
def variant(request, shared_unet):
    if not request.param.startswith("compiled"):
        yield VARIANTS[request.param](copy.deepcopy(shared_unet))
        return
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):
        yield VARIANTS[request.param](copy.deepcopy(shared_unet))
    torch.compiler.reset()


class TestEveryModel:
    """Each test leaves the model as it was."""

    def test_image_is_bit_identical_and_all_sites_are_seen(self, variant):
        # nine layers with two maps each, and exactly the output of the untraced model
        before = run(variant)
        with trace(variant, recipe()) as attention:
            during = run(variant)
        assert torch.equal(before, during)
        assert torch.equal(before, run(variant))
        assert [site.calls for site in attention.sites] == [1] * 9
        maps = attention.maps()
        assert maps.layers == tuple(f"up_blocks.{b}.attentions.{a}" for b in (1, 2, 3) for a in range(3))
        for direction, grid in zip(Direction, (LATENT, REFERENCE), strict=True):
            unified = maps.unified(direction)
            assert unified.values.shape == (BATCH, *grid)
            assert unified.values.isfinite().all()

    def test_no_hook_remains(self, variant):
        before = hook_count(variant)
        with trace(variant, recipe()):
            run(variant)
            assert hook_count(variant) > before
        assert hook_count(variant) == before

    def test_no_hook_remains_after_an_error(self, variant):
        before = hook_count(variant)
        with pytest.raises(ZeroDivisionError, match="user"), trace(variant, recipe()):
            raise ZeroDivisionError("user")
        with pytest.raises(RuntimeError, match=r"shape|size|mat1"), trace(variant, recipe()):
            variant(inputs()[0], torch.tensor(1), torch.randn(BATCH, 3, CONTEXT + 1))
        assert hook_count(variant) == before
        with trace(variant, recipe()) as attention:
            run(variant)
        assert attention.maps().store.batch == BATCH


def test_lora_injected_before_the_trace_is_what_is_seen(unet):
    # its scores differ from the base model's
    with trace(unet, recipe()) as plain:
        run(unet)
    with trace(add_lora(unet), recipe()) as adapted:
        run(unet)
    first, second = (t.maps().unified(Direction.REFERENCE_TO_GENERATED).values for t in (plain, adapted))
    assert not torch.allclose(first, second, rtol=1e-3)


def seeded_lora(unet):
    torch.manual_seed(4)
    return add_lora(unet)


@pytest.mark.parametrize("when", ["inside the trace", "between two steps"])
def test_lora_injected_after_the_hooks_is_what_is_seen(unet, when):
    # peft puts a layer around each projection; the maps are those of the adapted model
    adapted = seeded_lora(copy.deepcopy(unet))
    expected = []
    for timestep, model in ((500, unet if when == "between two steps" else adapted), (400, adapted)):
        with trace(model, recipe()) as attention:
            run(model, timestep=timestep)
        expected.append(attention.maps().store.layer(2).to_generated[:, 0])
    before = hook_count(unet)
    with trace(unet, recipe()) as attention:
        if when == "inside the trace":
            seeded_lora(unet)
        run(unet, timestep=500)
        if when == "between two steps":
            seeded_lora(unet)
        run(unet, timestep=400)
    found = attention.maps().store.layer(2).to_generated
    assert torch.equal(found, torch.stack(expected, dim=1))
    assert hook_count(unet) == before


def test_a_replaced_forward_is_read_by_its_class(unet):
    # tools put a function of *args before it; positional arguments are the class's
    with trace(unet, recipe()) as attention:
        run(unet)
    plain, forward = attention.maps(), unet.forward
    unet.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with trace(unet, recipe()) as attention:
        run(unet)
    found, expected = attention.maps().store.layer(5), plain.store.layer(5)
    assert torch.equal(found.to_reference, expected.to_reference)
    unet.forward = lambda picture, time, words: forward(picture, time, words)
    message = r"without a picture 'sample'.*picture, time, words; its forward was replaced"
    with pytest.raises(CaptureError, match=message):
        traced(unet, recipe(), {})


@pytest.mark.parametrize("via", ["projections", "sdpa"])
class TestMasks:
    """encoder_attention_mask hides reference tokens; True is let through."""

    @staticmethod
    def evaluate(unet, mask):
        with torch.no_grad():
            unet(*inputs(), encoder_attention_mask=mask)

    def test_hidden_tokens_are_refused(self, unet, via):
        mask = torch.ones(BATCH, REFERENCE.tokens, dtype=torch.bool)
        mask[1, 10:] = False
        message = r"Layer up_blocks.1.attentions.0 attends under a mask \(attention_mask\)"
        with trace(unet, recipe(), via=via), pytest.raises(CaptureError, match=message):
            self.evaluate(unet, mask)
        assert hook_count(unet) == 0

    def test_a_mask_that_hides_nothing_changes_nothing(self, unet, via):
        stores = []
        for mask in (None, torch.ones(BATCH, REFERENCE.tokens, dtype=torch.bool)):
            with trace(unet, recipe(), via=via) as attention:
                self.evaluate(unet, mask)
            stores.append(attention.maps().store)
        one, other = (store.layer(2).to_reference for store in stores)
        torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


BROKEN = "up_blocks.2.attentions.1"


class TestValuesThatAreNoNumbers:
    """An error names where they began: layer and step."""

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("projection", ["to_q", "to_k"])
    def test_a_layer_that_overflows_in_the_second_step(self, unet, projection, value):
        module = unet.get_submodule(f"{BROKEN}.transformer_blocks.0.attn2.{projection}")
        with trace(unet, recipe()) as attention:
            run(unet, timestep=900)
            with torch.no_grad():
                module.weight[3, 2] = value
            run(unet, timestep=500)
            run(unet, timestep=100)
        message = rf"first seen in the attention of layer {BROKEN} in step 2 of 3 \(timestep 500\)"
        with pytest.raises(CaptureError, match=message):
            attention.maps()

    def test_one_value_of_one_sample(self, unet):
        # an unconditional row would not be looked at: it has no map
        sample, timestep, context = inputs()
        context[1, 7, 4] = float("inf")
        for rows, refused in ((slice(0, 1), False), (slice(0, BATCH), True)):
            announced = announce(step_index=4, conditional_rows=rows)
            with trace(unet, recipe()) as attention, torch.no_grad(), announced:
                unet(sample, timestep, context)
            if refused:
                with pytest.raises(CaptureError, match=r"up_blocks.1.attentions.0 in step 1 of 1"):
                    attention.maps()
            else:
                assert attention.maps().store.batch == 1


def test_attaching_twice_is_refused_and_leaves_the_first_intact(unet):
    with trace(unet, recipe()) as attention:
        with pytest.raises(CaptureError, match="already has a trace"), trace(unet, recipe()):
            pass
        run(unet)
    assert attention.maps().store.steps == 1
    with pytest.raises(CaptureError, match="used already"):
        attention.__enter__()
    assert hook_count(unet) == 0


def test_a_failed_attachment_attaches_nothing(unet):
    with pytest.raises(CaptureError, match="No attention layer is called"):
        trace(unet, recipe(), matrix_layers=["up_blocks.7.attentions.0"]).__enter__()
    assert hook_count(unet) == 0


def test_numbers_of_a_model_without_the_papers_layers_are_shown(unet):
    # nine layers by other names: numbers count all of them, whichever are captured
    parts = Site(r"up_blocks\.(?P<layer>\d\.attentions\.\d)\.transformer_blocks\.0\.attn2", reference=Tokens(REFERENCE))
    with trace(unet, Recipe("", (parts,), rows="all"), layers=[2, "3.attentions.2"]) as attention:
        run(unet)
    assert [(site.layer, site.numbers) for site in attention.sites] == [
        ("1.attentions.1", "2"),
        ("3.attentions.2", "9"),
    ]
    assert "3.attentions.2  9 " in str(attention.sites)


def test_rows_are_those_that_the_sampler_announces(unet):
    # the same samples as second half, first half or by function give the same maps
    sample, timestep, context = inputs(batch=2 * BATCH)
    kept = []
    for rows in (slice(0, BATCH), slice(BATCH, 2 * BATCH)):
        order = torch.arange(2 * BATCH).roll(-rows.start)
        announcement = announce(step_index=0, conditional_rows=rows)
        with trace(unet, recipe()) as attention, torch.no_grad(), announcement:
            unet(sample[order.argsort()], timestep, context[order.argsort()])
        kept.append(attention.maps())
    with trace(unet, recipe(rows="first_half")) as attention, torch.no_grad():
        unet(sample, timestep, context)
    kept.append(attention.maps())
    values = [maps.unified(Direction.GENERATED_TO_REFERENCE).values for maps in kept]
    assert values[0].shape[0] == BATCH
    torch.testing.assert_close(values[1], values[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(values[2], values[0], rtol=1e-5, atol=0)


def test_unconditional_calls_are_skipped(unet):
    # guidance by two calls: only the conditional one is kept
    with trace(unet, recipe()) as attention:
        for step in range(2):
            for rows in (slice(0, BATCH), None):
                with announce(step_index=step, conditional_rows=rows):
                    run(unet, seed=step)
    assert attention.maps().store.steps == 2
    assert {site.calls for site in attention.sites} == {2}


def test_two_evaluations_of_one_timestep_are_one_step(unet):
    # PNDM: 750, 500, 500, 250; the two are averaged
    with trace(unet, recipe()) as attention, torch.no_grad():
        for call, timestep in enumerate((750, 500, 500, 250)):
            sample, _, context = inputs(seed=call)
            unet(sample, torch.tensor(timestep), context)
    store = attention.maps().store
    assert store.timesteps == (750.0, 500.0, 250.0)
    singles = []
    for call in (1, 2):
        with trace(unet, recipe()) as attention, torch.no_grad():
            unet(inputs(seed=call)[0], timestep=500, encoder_hidden_states=inputs(seed=call)[2])
        singles.append(attention.maps().store.layer(5).to_reference[:, 0])
    both = (singles[0] + singles[1]) / 2
    timesteps_differ_little = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(store.layer(5).to_reference[:, 1], both, **timesteps_differ_little)


def test_gradient_checkpointing_is_harmless(unet):
    # the recomputation in backward is not captured, in a trace or by a tap
    unet.train().enable_gradient_checkpointing()
    with trace(unet, recipe()) as attention:
        unet(*inputs()).sample.square().mean().backward()
    assert {site.calls for site in attention.sites} == {1}


def test_another_use_of_the_modules_outside_the_root_is_dropped(unet):
    block = unet.up_blocks[1].attentions[0]
    with trace(unet, recipe()) as attention:
        run(unet)
        with torch.no_grad():
            block(torch.randn(BATCH, 16, 6, 4), encoder_hidden_states=inputs()[2], return_dict=False)
    assert {site.calls for site in attention.sites} == {1}


def test_pipelines_are_traced_through_their_root(unet):
    class Pipeline:
        def __init__(self, unet):
            self.unet = unet

    with trace(Pipeline(unet), recipe(root="unet")) as attention:
        run(unet)
    assert "up_blocks.1.attentions.1" in str(attention.sites)
    assert "6x4" in str(attention.sites)
    assert [site.numbers for site in attention.sites] == list("123456789")


def test_a_model_may_bring_its_own_recipe(unet):
    unet.attention_recipe = lambda: recipe()
    with trace(unet) as attention:
        run(unet)
    assert attention.maps().store.batch == BATCH


def test_single_reference_token_is_marked_as_not_functional(unet):
    # a softmax over one key is one, so such maps tell nothing about the picture
    with trace(unet, diffusers_decoder(None, root="", rows="all")) as attention:
        run(unet, tokens=1)
    assert not any(site.functional for site in attention.sites)
    assert "no (one key)" in str(attention.sites)
    maps = attention.maps()
    assert not maps.store.layers[0].functional
    with pytest.raises(CaptureError, match="no place in the reference picture"):
        maps.unified(Direction.GENERATED_TO_REFERENCE)


def traced(unet, recipe, *calls):
    with trace(unet, recipe):
        for options in calls:
            run(unet, **options)


def announced(unet, steps):
    with trace(unet, recipe()):
        for step in steps:
            with announce(step_index=step, conditional_rows=slice(0, BATCH)):
                run(unet)


class TestErrors:
    def test_unknown_model(self, unet):
        with pytest.raises(CaptureError, match=r"No recipe is known for UNet2D.*diffusers_decoder"):
            trace(unet)

    def test_no_site(self, unet):
        with pytest.raises(CaptureError, match=r"matches 'decoder.*has: .*attn"):
            trace(unet, Recipe("", (Site(r"decoder\..*"),))).__enter__()

    def test_no_root(self, unet):
        with pytest.raises(CaptureError, match=r"has no part 'unet'.*up_blocks"):
            trace(unet, recipe(root="unet")).__enter__()

    def test_fused_projections(self, unet):
        unet.fuse_qkv_projections()
        with pytest.raises(CaptureError, match="unfuse_qkv_projections"):
            trace(unet, recipe()).__enter__()
        unet.unfuse_qkv_projections()
        with trace(unet, recipe()) as attention:
            run(unet)
        assert attention.maps().store.batch == BATCH

    def test_missing_projection(self, unet):
        site = Site(r".*\.attn2", generated_projection="q_proj")
        with pytest.raises(CaptureError, match=r"no submodule 'q_proj' \(it has: to_q"):
            trace(unet, Recipe("", (site,))).__enter__()

    def test_reference_grid_mismatch_names_the_site(self, unet):
        wrong = diffusers_decoder(GridSize(6, 4), root="", rows="all")
        with pytest.raises(CaptureError, match=r"Layer up_blocks.1.attentions.0: 20 tokens .* 6x4"):
            traced(unet, wrong, {})
        assert hook_count(unet) == 0

    def test_generated_grid_mismatch_names_the_site(self, unet):
        # token merging: fewer queries than the latent has cells
        module = unet.up_blocks[2].attentions[1].transformer_blocks[0].attn2
        module.to_q.register_forward_hook(lambda _, __, output: output[:, 1:])
        with pytest.raises(CaptureError, match=r"Layer up_blocks.2.attentions.1: .*95 .*24x16"):
            traced(unet, recipe(), {})

    def test_model_not_called(self, unet):
        with trace(unet, recipe()) as attention:
            pass
        with pytest.raises(CaptureError, match="not called inside"):
            attention.maps()

    def test_site_not_called(self, unet):
        with trace(unet, recipe()) as attention:
            run(unet)
            unet.up_blocks[3].attentions[0].forward = lambda hidden, *args, **kwargs: (hidden,)
            run(unet, timestep=400)
        with pytest.raises(CaptureError, match=r"each of the 2 .*: up_blocks.3.attentions.0 \(1\)"):
            attention.maps()

    def test_changed_batch(self, unet):
        with pytest.raises(CaptureError, match=r"2 conditional rows after 3.*one trace per batch"):
            traced(unet, recipe(), {}, {"batch": 2})

    def test_changed_picture_size(self, unet):
        with pytest.raises(CaptureError, match=r"one trace per picture size"):
            traced(unet, recipe(), {}, {"latent": GridSize(16, 16), "timestep": 400})

    def test_odd_batch_with_a_recipe_for_guidance(self, unet):
        with pytest.raises(CaptureError, match=r"called with 3 rows.*rows='all'"):
            traced(unet, recipe(rows="second_half"), {})

    def test_second_run_in_one_trace(self, unet):
        with pytest.raises(CaptureError, match="second sampling run"):
            announced(unet, steps=(0, 1, 0))


def test_tap_and_trace_may_listen_at_once(unet):
    # a callback traces validation sampling while the training tap stays attached
    with ScoreTap(unet, recipe(), layers=[2]) as tap:
        unet(*inputs())
        scores = tap.scores(2)
        with trace(unet, recipe()) as attention:
            run(unet, seed=5)
        assert tap.scores(2) is scores
        assert attention.maps().store.steps == 1
    assert hook_count(unet) == 0


def test_our_sampler_announces_time_and_branch(make_small_model):
    # with guidance the maps are those of the conditional half, and the images stay bit for bit
    model = make_small_model()
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(3, BATCH, 3, 64, 48, generator=generator) * 2 - 1

    def draw(guidance):
        return sample(model, *images, seeds=range(BATCH), steps=2, guidance=guidance)

    before = draw(5.0)
    with trace(model) as attention:
        during = draw(5.0)
    assert torch.equal(before, during)
    store = attention.maps().store
    assert (store.batch, store.steps, len(store.layers)) == (BATCH, 2, 9)
    with trace(model) as attention:
        draw(1.0)
    unguided = attention.maps().store  # the first step does not depend on guidance
    for one, other in zip(store.layers, unguided.layers, strict=True):
        torch.testing.assert_close(one.to_reference[:, 0], other.to_reference[:, 0], rtol=1e-4, atol=0)


class Narrow(torch.nn.Module):
    """A network of somebody else: no heads, and names that nobody knows."""

    def __init__(self):
        super().__init__()
        self.mixer = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 16), "b": torch.nn.Linear(8, 16)})

    def forward(self, sample, time):
        return self.mixer["a"](sample.flatten(2).mT), self.mixer["b"](sample.flatten(2).mT)


@pytest.mark.parametrize(
    ("site", "options", "message"),
    [
        ({"pattern": "mixr"}, {}, r"This model has: mixer\. .*paths start below the recipe's root, 'the model'"),
        ({"pattern": "x", "reference_projection": "c"}, {}, "has: no module with heads, and none with the projections"),
        (
            {"pattern": "mixer"},
            {"timestep": "tim"},
            r"Narrow has no argument 'tim', the recipe's timestep \(its forward",
        ),
    ],
)
def test_slips_in_a_recipe_are_named(site, options, message):
    site = Site(**{"generated_projection": "a", "reference_projection": "b", "heads": 2, **site})
    with (
        pytest.raises(CaptureError, match=message),
        trace(Narrow(), Recipe(**{"root": "", "sites": (site,), **options})),
    ):
        pass


def test_a_single_site_is_no_tuple():
    made = recipe()
    object.__setattr__(made, "sites", made.sites[0])  # the tests check types before Recipe does
    with pytest.raises(CaptureError, match=r"Recipe\.sites is Site\(.*a comma also behind a single one"):
        made.__post_init__()


def test_heads_divide_the_width(unet):
    sites = (Site(r"mid_block.*attn2", heads=3, reference=recipe().sites[0].reference),)
    message = r"Layer mid_block.*: its tokens are 16 wide, which 3 heads do not divide"
    with pytest.raises(CaptureError, match=message), trace(unet, Recipe("", sites, rows="all")):
        run(unet)
