"""Demands on the second backend: it sees what projection hooks see, and what they cannot; the image
does not change, nothing stays attached, and blindness is an error."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, IPAdapterAttnProcessor2_0
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from i2am_train.attention import (
    Recipe,
    ScoreTap,
    Site,
    Tokens,
    detect_recipe,
    diffusers_decoder,
    named_recipe,
    replace_backend,
    trace,
)
from i2am_train.errors import CaptureError
from i2am_train.types import Backend, Direction, GridSize
from tests.support.lora import add_lora

BATCH, LATENT, REFERENCE, CONTEXT, TEXT = 3, GridSize(12, 8), GridSize(4, 3), 10, 5
HALF = GridSize(6, 4)


def noise(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_weights(model):
    """All weights away from their initial values, norms' scales too."""
    with torch.no_grad():
        for seed, parameter in enumerate(model.parameters()):
            parameter += 0.3 * noise(*parameter.shape, seed=seed)
    return model.eval()


@pytest.fixture(scope="module")
def shared_unet():
    return random_weights(
        UNet2DConditionModel(
            sample_size=tuple(LATENT),
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=(1, 2),
            cross_attention_dim=CONTEXT,
            norm_num_groups=4,
            layers_per_block=1,
        )
    )


@pytest.fixture
def unet(shared_unet):
    return copy.deepcopy(shared_unet)


@pytest.fixture(scope="module")
def sd3():
    return random_weights(
        SD3Transformer2DModel(
            sample_size=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            caption_projection_dim=16,
            pooled_projection_dim=6,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
        )
    )


@pytest.fixture(scope="module")
def flux():
    return random_weights(
        FluxTransformer2DModel(
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=CONTEXT,
            pooled_projection_dim=6,
            axes_dims_rope=(4, 2, 2),
        )
    )


def run_unet(unet, context=None):
    tokens = noise(BATCH, REFERENCE.tokens + 1, CONTEXT, seed=2) if context is None else context
    with torch.no_grad():
        return unet(noise(BATCH, 4, *LATENT), torch.tensor(500), tokens).sample


def run_sd3(model):
    """Joint attention over [picture; context], where the context is the reference's tokens."""
    with torch.no_grad():
        return model(
            noise(BATCH, 4, *LATENT),
            encoder_hidden_states=noise(BATCH, REFERENCE.tokens, CONTEXT, seed=2),
            pooled_projections=noise(BATCH, 6),
            timestep=torch.full((BATCH,), 500),
        ).sample


def sd3_recipe():
    """Generated tokens first, the reference's last; half the latent's size (patches of 2x2)."""
    site = Site(
        r"(?P<layer>transformer_blocks\.\d+)\.attn",
        generated=Tokens("latent", stop=-REFERENCE.tokens),
        reference=Tokens(REFERENCE, skip=-REFERENCE.tokens),
        joint=True,
        via="sdpa",
    )
    return Recipe("", (site,), "all", "hidden_states", name="sd3_image_reference")


def position_ids(picture, grid):
    rows, columns = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return torch.stack([torch.full_like(rows, picture), rows, columns], dim=-1).reshape(-1, 3)


def run_flux(model, generated=HALF, reference=REFERENCE):
    """As the Kontext pipeline calls it: text, generated tokens, reference tokens."""
    ids = torch.cat([position_ids(0, generated), position_ids(1, reference)])
    with torch.no_grad():
        return model(
            hidden_states=noise(BATCH, len(ids), 4),
            encoder_hidden_states=noise(BATCH, TEXT, CONTEXT, seed=2),
            pooled_projections=noise(BATCH, 6),
            timestep=torch.full((BATCH,), 0.5),
            img_ids=ids,
            txt_ids=torch.zeros(TEXT, 3),
        ).sample


def flux_recipe(model):
    return named_recipe(
        model, "flux_kontext", generated_grid=HALF, reference_grid=REFERENCE, text_tokens=TEXT, guided=False
    )


def hook_count(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_always_called")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def assert_nothing_remains(model):
    assert hook_count(model) == 0
    assert torch._C._len_torch_function_stack() == 0


def two_adapters(unet):
    """The cross-attentions as diffusers leaves them after loading two IP-Adapters."""
    torch.manual_seed(0)
    for module in unet.modules():
        if isinstance(module, Attention) and module.is_cross_attention:
            module.set_processor(IPAdapterAttnProcessor2_0(module.inner_dim, CONTEXT, (4, 3), [1.0, 0.5]))
    return unet


IP_CONTEXT = (noise(BATCH, TEXT, CONTEXT), [noise(BATCH, 1, 4, CONTEXT, seed=3), noise(BATCH, 2, 3, CONTEXT, seed=4)])
PLAIN = {"prepare": lambda unet: unet, "context": None}
SHARED_RECIPES = {
    "diffusers_decoder": (PLAIN, lambda unet: diffusers_decoder(REFERENCE, 1, "all", "")),
    "paint_by_example": (
        PLAIN | {"context": noise(BATCH, 1, CONTEXT)},
        lambda unet: named_recipe(unet, "paint_by_example", guided=False),
    ),
    "catvton": (PLAIN, lambda unet: named_recipe(unet, "catvton", guided=False)),
    "ladi_vton": (PLAIN, lambda unet: named_recipe(unet, "ladi_vton", first=3, count=4, guided=False)),
    "ip_adapter_0": (
        {"prepare": two_adapters, "context": IP_CONTEXT},
        lambda unet: named_recipe(unet, "ip_adapter", guided=False),
    ),
    "ip_adapter_1": (
        {"prepare": two_adapters, "context": IP_CONTEXT},
        lambda unet: named_recipe(unet, "ip_adapter", adapter=1, guided=False),
    ),
}


@pytest.mark.parametrize("name", list(SHARED_RECIPES))
def test_both_backends_give_the_same_maps(name, unet):
    case, make_recipe = SHARED_RECIPES[name]
    unet = case["prepare"](unet)
    stores = []
    for via in Backend:
        with trace(unet, make_recipe(unet), matrix_layers=None, via=via) as attention:
            run_unet(unet, case["context"])
        stores.append(attention.maps().store)
        assert_nothing_remains(unet)
    by_projections, by_sdpa = stores
    assert by_sdpa.names == by_projections.names
    for one, other in zip(by_projections.layers, by_sdpa.layers, strict=True):
        assert (one.generated_grid, one.reference_grid) == (other.generated_grid, other.reference_grid)
        for field in ("to_generated", "to_reference", "mass", "scores_over_reference"):
            expected, found = getattr(one, field), getattr(other, field)
            if expected is None:
                assert found is None
            else:
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("scales", "seen"), [([0.0, 1.0], 1), ([1.0, 0.0], 0)])
def test_an_adapter_whose_scale_is_zero_is_not_taken_for_another(scales, seen, unet):
    # diffusers leaves its attention call out, so that the next one's comes in its place
    two_adapters(unet)
    for processor in unet.attn_processors.values():
        if isinstance(processor, IPAdapterAttnProcessor2_0):
            processor.scale = scales
    for adapter in (0, 1):
        stores = []
        for via in Backend:
            with trace(unet, named_recipe(unet, "ip_adapter", adapter=adapter, guided=False), via=via) as attention:
                run_unet(unet, IP_CONTEXT)
            if adapter == seen:
                stores.append(attention.maps().store)
            else:
                with pytest.raises(CaptureError, match=r"did not attend|never called"):
                    attention.maps()
        if stores:
            by_projections, by_sdpa = (store.layers[0].to_reference for store in stores)
            torch.testing.assert_close(by_sdpa, by_projections, rtol=1e-6, atol=1e-9)


def slow_maps(query, key, scale, generated, reference):
    """Both column means and the mass, by loops over rows, heads and tokens, in float64."""
    rows, heads = query.shape[:2]
    to_generated = torch.zeros(rows, heads, len(generated), dtype=torch.float64)
    to_reference = torch.zeros(rows, heads, len(reference), dtype=torch.float64)
    mass = torch.zeros_like(to_generated)
    for row in range(rows):
        for head in range(heads):
            q, k = query[row, head].double(), key[row, head].double()
            logits = torch.stack([torch.stack([scale * q[n] @ k[m] for m in reference])
                                  for n in generated])  # fmt: skip
            for n in range(len(generated)):
                to_reference[row, head] += logits[n].softmax(0) / len(generated)
                every = (scale * k @ q[generated[n]]).exp().sum()
                mass[row, head, n] = logits[n].exp().sum() / every
            for m in range(len(reference)):
                to_generated[row, head] += logits[:, m].softmax(0) / len(reference)
    return to_generated, to_reference, mass


@pytest.fixture
def recorded_calls(monkeypatch):
    """Queries and keys of all attention calls, by a wrapper of torch's function."""
    calls, original = [], F.scaled_dot_product_attention

    def wrapper(query, key, value, *args, **kwargs):
        calls.append((query, key))
        return original(query, key, value, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrapper)
    return calls


TRANSFORMERS = {
    "sd3": (run_sd3, lambda model: sd3_recipe(), 0, ("transformer_blocks.0", "transformer_blocks.1")),
    "flux": (run_flux, flux_recipe, TEXT, ("transformer_blocks.0", "single_transformer_blocks.0")),
}  # fmt: skip


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_joint_attention_after_norm_and_rotation_equals_a_slow_loop(name, request, recorded_calls):
    # SD3 normalises its queries and keys after the projection, Flux rotates them too
    run, make_recipe, start, layers = TRANSFORMERS[name]
    model = request.getfixturevalue(name)
    before = run(model)
    recorded_calls.clear()
    with trace(model, make_recipe(model)) as attention:
        during = run(model)
    assert torch.equal(before, during)
    assert_nothing_remains(model)
    store = attention.maps().store
    assert store.names == layers
    middle = start + HALF.tokens
    places = list(range(start, middle)), list(range(middle, middle + REFERENCE.tokens))
    for layer, (query, key) in zip(store.layers, recorded_calls, strict=True):
        assert (layer.generated_grid, layer.reference_grid) == (HALF, REFERENCE)
        expected = slow_maps(query, key, 8**-0.5, *places)
        found = layer.to_generated, layer.to_reference, layer.mass
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one[:, 0], other.float(), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "backend"), [("sd3", "eager"), ("flux", "eager"), pytest.param("flux", "inductor", marks=pytest.mark.slow)]
)
def test_joint_attention_of_a_network_compiled_whole(name, backend, request):
    # run in one graph before the trace, which must neither miss a call nor make another graph
    run, make_recipe, _, layers = TRANSFORMERS[name]
    plain = request.getfixturevalue(name)
    model, graphs = copy.deepcopy(plain), CompileCounterWithBackend(backend)
    model.compile(backend=graphs, fullgraph=True)
    before = run(model)
    stores = []
    for traced in (plain, model):
        with trace(traced, make_recipe(traced)) as attention:
            run(traced)
        stores.append(attention.maps().store)
    assert stores[1].names == layers
    for one, other in zip(stores[0].layers, stores[1].layers, strict=True):
        for field in ("to_generated", "to_reference", "mass"):
            assert torch.equal(getattr(one, field), getattr(other, field))
    assert torch.equal(run(model), before)
    assert graphs.frame_count == 1
    torch.compiler.reset()


def test_projection_hooks_refuse_normalised_tokens_and_name_the_other_backend(sd3):
    recipe = replace_backend(sd3_recipe(), Backend.PROJECTIONS)
    with pytest.raises(CaptureError, match=r"normalises its tokens.*via='sdpa'"):
        trace(sd3, recipe).__enter__()
    assert_nothing_remains(sd3)


def test_kontext_is_recognised_and_refuses_pictures_of_other_sizes(flux):
    class FluxKontextPipeline:
        transformer = flux

    assert detect_recipe(FluxKontextPipeline()).name == "flux_kontext"
    match = "4x6 generated and 4x3 reference tokens, and the recipe says 6x4 and 4x3"
    with pytest.raises(CaptureError, match=match), trace(flux, flux_recipe(flux)):
        run_flux(flux, generated=GridSize(4, 6))
    with pytest.raises(CaptureError, match="0x0 reference"), trace(flux, flux_recipe(flux)):
        run_flux(flux, reference=GridSize(0, 0))
    assert_nothing_remains(flux)


@pytest.mark.parametrize("names", [("cond", "uncond"), ("pred_uncond", "pred_cond")])
def test_calls_that_a_pipeline_names_are_told_apart(names, flux):
    # diffusers runs each half of guidance in a cache context of that name, in either order
    recipe = replace(flux_recipe(flux), guided=None)
    maps = []
    for called in (names, [name for name in names if not name.endswith("uncond")]):
        with trace(flux, recipe) as attention:
            for name in called:
                model = flux if "uncond" not in name else Negated(flux)
                with flux.cache_context(name):
                    run_flux(model)
        maps.append(attention.maps().store)
        assert "cache_context" not in vars(flux)
    for one, other in zip(maps[0].layers, maps[1].layers, strict=True):
        assert torch.equal(one.to_generated, other.to_generated)
    with pytest.raises(CaptureError, match="does not say whether"), trace(flux, recipe):
        run_flux(flux)
    assert_nothing_remains(flux)


class Negated:
    """The same network on another text."""

    def __init__(self, model):
        self.model = model

    def __call__(self, encoder_hidden_states, **others):
        return self.model(encoder_hidden_states=-encoder_hidden_states, **others)


def compile_it(unet):
    unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2.compile(backend="eager")
    run_unet(unet)
    return unet


def fuse(unet):
    unet.fuse_qkv_projections()
    return unet


VARIANTS = {"plain": lambda unet: unet, "lora": add_lora, "fused": fuse, "compiled": compile_it}


def decoder():
    return diffusers_decoder(REFERENCE, 1, "all", "")


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_image_is_bit_identical_and_nothing_remains(variant, unet):
    unet = VARIANTS[variant](unet)
    before = run_unet(unet)
    with trace(unet, decoder(), via="sdpa") as attention, torch.inference_mode():
        during = run_unet(unet)
    assert torch.equal(before, during)
    assert torch.equal(before, run_unet(unet))
    assert [site.calls for site in attention.sites] == [1, 1]
    assert [site.heads for site in attention.sites] == [1, 1]
    assert attention.maps().unified(Direction.GENERATED_TO_REFERENCE).values.isfinite().all()
    assert_nothing_remains(unet)
    torch.compiler.reset()


def test_nothing_remains_after_errors(unet):
    wrong = noise(BATCH, 3, CONTEXT + 1)
    with pytest.raises(RuntimeError, match="shape"), trace(unet, decoder(), via="sdpa"):
        run_unet(unet, wrong)
    assert_nothing_remains(unet)
    # an interrupt skips torch's own hooks that are always called
    attn = unet.up_blocks[1].attentions[0].transformer_blocks[0].attn2
    attn.to_out[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt, match="user"), trace(unet, decoder(), via="sdpa"):
        run_unet(unet)
    assert torch._C._len_torch_function_stack() == 0


def interrupt(*_):
    raise KeyboardInterrupt("user")


def test_gradient_checkpointing_is_harmless_and_a_tap_gets_its_gradient(unet):
    unet.train().enable_gradient_checkpointing()
    recipe = replace_backend(decoder(), "sdpa")
    layer = "up_blocks.1.attentions.1"
    with ScoreTap(unet, recipe, layers=[layer]) as tap, trace(unet, recipe) as attention:
        tokens = noise(BATCH, REFERENCE.tokens + 1, CONTEXT)
        output = unet(noise(BATCH, 4, *LATENT), torch.tensor(5), tokens).sample
        (output.square().mean() + tap.scores(layer).square().sum()).backward()
    assert {site.calls for site in attention.sites} == {1}
    assert_nothing_remains(unet)
    weight = unet.up_blocks[1].attentions[1].transformer_blocks[0].attn2.to_k.weight
    assert weight.grad.abs().sum() > 0


BLIND = {
    "sliced": lambda unet: unet.set_attention_slice(1),
    "own softmax": lambda unet: unet.set_attn_processor(AttnProcessor()),
}


@pytest.mark.parametrize("kernel", list(BLIND))
def test_a_kernel_that_is_not_seen_is_an_error_at_the_end(kernel, unet):
    BLIND[kernel](unet)
    with trace(unet, decoder(), via="sdpa") as attention:
        run_unet(unet)
    with pytest.raises(
        CaptureError,
        match=r"'sdpa' and never called .*\(call number 0\): up_blocks.1.attentions.0"
        r".*via='projections'",
    ):
        attention.maps()
    with trace(unet, decoder()) as attention:
        run_unet(unet)
    assert len(attention.maps().layers) == 2


class Toy(nn.Module):
    """One attention call with the arguments of a test; rows, heads and tokens of its own."""

    def __init__(self, **options):
        super().__init__()
        self.attn = nn.Module()
        self.attn.forward = lambda q, k: F.scaled_dot_product_attention(query=q, key=k, value=k, **options)

    def forward(self, sample, query, key):
        return self.attn(query, key)


TOY_QUERY, TOY_KEY = noise(2, 6, HALF.tokens, 5), noise(2, 3, REFERENCE.tokens, 5, seed=2)


def toy_maps(query=TOY_QUERY, key=TOY_KEY, **options):
    site = Site("attn", reference=Tokens(REFERENCE), via="sdpa")
    model = Toy(**options)
    with trace(model, Recipe("", (site,), "all", timestep=None)) as attention:
        model(torch.zeros(2, 1, *HALF), query, key)
    return attention.maps().store.layers[0]


def test_the_calls_own_scale_and_shared_key_heads_are_respected():
    # grouped queries: head h reads key head h // 2
    layer = toy_maps(scale=0.7, enable_gqa=True, attn_mask=torch.ones(1, 1, 1, 12).bool())
    keys = torch.stack([TOY_KEY[:, head // 2] for head in range(6)], dim=1)
    places = range(HALF.tokens), range(REFERENCE.tokens)
    to_generated, to_reference, _ = slow_maps(TOY_QUERY, keys, 0.7, *map(list, places))
    torch.testing.assert_close(layer.to_generated[:, 0], to_generated.float(), rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(layer.to_reference[:, 0], to_reference.float(), rtol=1e-5, atol=1e-8)


MASK = torch.arange(REFERENCE.tokens) > 1


@pytest.mark.parametrize("mask", [MASK, MASK.float()], ids=["boolean", "added"])
def test_masks_that_change_the_scores_are_refused(mask):
    with pytest.raises(CaptureError, match="Layer attn attends under a mask"):
        toy_maps(key=noise(2, 6, 12, 5), attn_mask=mask[None, None, None])
    assert torch._C._len_torch_function_stack() == 0


def test_causal_attention_and_queries_without_heads_are_refused():
    with pytest.raises(CaptureError, match="Layer attn attends causally"):
        toy_maps(key=noise(2, 6, 12, 5), is_causal=True)
    with pytest.raises(CaptureError, match=r"shape \[2, 24, 5\]; expected \[row, head, token"):
        toy_maps(noise(2, 24, 5), noise(2, 12, 5))


def test_unknown_words_in_a_site_are_errors():
    with pytest.raises(CaptureError, match=r"no backend 'xformers'. Expected one of projections, s"):
        Site("attn", via="xformers")
    with pytest.raises(CaptureError, match="sdpa_call is -1"):
        Site("attn", sdpa_call=-1)


def test_an_ordinal_beyond_the_modules_calls_is_an_error(unet):
    recipe = decoder()
    site = Site(recipe.sites[0].pattern, reference=Tokens(None), via="sdpa", sdpa_call=1)
    with trace(SimpleNamespace(unet=unet), Recipe("unet", (site,), "all")) as attention:
        run_unet(unet)
    with pytest.raises(CaptureError, match=r"call number 1.*correct the site's sdpa_call"):
        attention.maps()
