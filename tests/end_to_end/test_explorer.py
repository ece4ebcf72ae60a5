"""The explorer in a real Chromium, from a file: its numbers are the archive's, and every way of asking works.

The captures are drawn at random in the shape of a model's; test_commands.py makes a page with the command.
"""

from __future__ import annotations

import base64
import io
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import JavascriptException, StaleElementReferenceException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from selenium.webdriver.support.wait import WebDriverWait

from i2am_train.attention.maps import AttributionMaps, HeatMap, load_maps, save_maps
from i2am_train.attention.recipe import PAPER_LAYERS
from i2am_train.attention.store import AttributionStore, LayerRecord, Rollup
from i2am_train.config.evaluation import AttributionConfig
from i2am_train.data.dataset import TryOnDataset, TryOnSample
from i2am_train.evaluation.explaining import MASKS, to_pictures
from i2am_train.evaluation.explanation import Explanation
from i2am_train.losses.attention import attention_centers
from i2am_train.metrics.attention import correspondence_error, imacs, target_on_grid
from i2am_train.reporting.explorer import explorer_data, explorer_page
from i2am_train.types import Direction, GridSize, LayerWeighting, Pairing, Split

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
SIZE = GridSize(64, 48)
REFERENCE = GridSize(8, 6)
LEVELS = ((GridSize(4, 3), 4), (GridSize(8, 6), 2), (GridSize(16, 12), 2))
"""Grid and heads of layers 1-3, 4-6 and 7-9."""
STEPS, GROUPS = 5, 3
SIDES = {"generated": Direction.REFERENCE_TO_GENERATED, "reference": Direction.GENERATED_TO_REFERENCE}
PRECISION = 5e-5
"""Of a normalised map: two roundings to 16 bits per layer, and float32 in Python's maps."""
SCORE_PRECISION = 2e-3
"""Of IMACS: a pixel within PRECISION of the threshold may fall on its other side."""
CENTRE_PRECISION = 168 / (2 * 65535)
"""Patches: half a step of 16 bits in each score, times the 168 that the rows of an 8x6 grid sum to."""

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="no chromium and chromedriver here (Debian: apt-get install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def samples(small_dataset: Path) -> list[TryOnSample]:
    """Two samples with known correspondence."""
    dataset = TryOnDataset(small_dataset, Split.TEST, Pairing.PAIRED, SIZE)
    return [dataset[3], dataset[1]]


def random_maps(seed: int) -> AttributionMaps:
    """A capture of nine layers with peaked attention."""
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return 2 * torch.randn(*shape, generator=noise)

    records = []
    for number, name in enumerate(PAPER_LAYERS):
        grid, heads = LEVELS[number // 3]
        logits = draw(1, grid.tokens, REFERENCE.tokens)
        records.append(
            LayerRecord(
                name,
                grid,
                REFERENCE,
                draw(1, STEPS, heads, grid.tokens).softmax(-1),
                draw(1, STEPS, heads, REFERENCE.tokens).softmax(-1),
                True,
                logits.softmax(-1),
                logits.softmax(-2),
            )
        )
    return AttributionMaps(AttributionStore(tuple(records), tuple(range(900, 400, -100))))


@pytest.fixture(scope="module")
def captures(tmp_path_factory: pytest.TempPathFactory) -> list[list[AttributionMaps]]:
    """Two models on two samples, as their archives hold them."""
    file = tmp_path_factory.mktemp("archive") / "maps.safetensors"
    return [[load_maps(save_maps(random_maps(2 * model + sample), file)).maps for sample in (0, 1)] for model in (0, 1)]


@pytest.fixture(scope="module")
def file(
    samples: list[TryOnSample], captures: list[list[AttributionMaps]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The page."""
    pictures = np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), dtype=np.uint8)
    models = {
        name: [
            explanation(sample, picture, maps) for sample, picture, maps in zip(samples, pictures, made, strict=True)
        ]
        for name, made in zip(("baseline", "refined"), captures, strict=True)
    }
    data = explorer_data(models, AttributionConfig(layer=2, time_groups=GROUPS))
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    path.write_text(explorer_page(data, {"Command": "i2am explain"}), encoding="utf-8")
    return path


def explanation(sample: TryOnSample, generated: NDArray[np.uint8], maps: AttributionMaps) -> Explanation:
    """As `i2am explain` makes it, but of a capture that was drawn."""
    return Explanation(
        name=sample["name"],
        inputs={"person": sample["name"], "garment": sample["garment_name"]},
        index=sample["index"],
        images={"generated": generated, "garment": to_pictures(sample["garment"][None])[0]},
        masks={name: sample[f"{name}_mask"].numpy() for name in MASKS},  # type: ignore[literal-required]
        correspondence=sample["correspondence"].numpy(),
        maps=maps,
        layer=PAPER_LAYERS[1],
        delta=0.4,
        weighting=LayerWeighting.PAPER,
        time_groups=GROUPS,
    )


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A browser window of a desktop's size."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    driver.set_window_size(1400, 1000)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium: Any, file: Path) -> Iterator[Any]:
    """The page, freshly opened from its file; afterwards its console must be empty."""
    visit(chromium, file)
    yield chromium
    assert chromium.get_log("browser") == []


def visit(browser: Any, file: Path, fragment: str = "") -> None:
    browser.get("about:blank")  # else a new fragment alone would not load the page again
    browser.get(f"{file.as_uri()}#{fragment}")
    # A script that is sent while the blank page makes way for the file is lost, and asked for again.
    lost = [StaleElementReferenceException, JavascriptException]
    WebDriverWait(browser, 20, ignored_exceptions=lost).until(
        lambda _: browser.execute_async_script("i2am.ready.then(() => arguments[0](true))")
    )


def state(browser: Any) -> dict[str, Any]:
    found: dict[str, Any] = browser.execute_script("return i2am.state")
    return found


def picture(browser: Any, side: str, sample: int = 0, model: int = 0) -> Any:
    card = f".capture[data-sample='{sample}'][data-model='{model}']"
    return browser.find_element("css selector", f"{card} .{side} canvas")


def pixels(browser: Any, canvas: Any) -> NDArray[np.int16]:
    """What a canvas shows, RGBA ``[height, width, 4]``."""
    url = browser.execute_script("return arguments[0].toDataURL()", canvas)
    with Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) as shown:
        return np.asarray(shown.convert("RGBA"), dtype=np.int16)


def same(first: NDArray[np.int16], second: NDArray[np.int16]) -> bool:
    """Whether two pictures are one; Chromium's rasteriser may round a pixel by one level differently."""
    return first.shape == second.shape and int(np.abs(first - second).max()) <= 1


def eventually(browser: Any, condition: Callable[[], object]) -> None:
    """Waits until the page has dealt with the mouse, which browsers report once per frame."""
    WebDriverWait(browser, 20).until(lambda _: condition())


def point_at(browser: Any, canvas: Any) -> ActionChains:
    """Moves the mouse into a patch, away from its border (the middle of a picture is one)."""
    return ActionChains(browser).move_to_element_with_offset(canvas, 9, 9)


def choose(browser: Any, name: str, value: str) -> None:
    Select(browser.find_element("name", name)).select_by_value(value)


def scored(heat_map: HeatMap) -> torch.Tensor:
    """What scores are defined on (evaluation/evaluator.py)."""
    return heat_map.normalised().resized(SIZE).normalised().values[0]


def mask_of(sample: TryOnSample, side: str) -> torch.Tensor:
    return sample["inpaint_mask" if side == "generated" else "garment_mask"][None]


def assert_shown(browser: Any, expected: torch.Tensor, mask: torch.Tensor, case: tuple[int, int, str]) -> None:
    """The page's map and its IMACS are Python's."""
    sample, model, side = case
    shown = browser.execute_script("return i2am.numbers(...arguments)", sample, model, side)
    values = np.array(shown["values"]).reshape(SIZE)
    assert values.max() == 1
    np.testing.assert_allclose(values, expected.numpy(), atol=PRECISION, rtol=0)
    delta, penalty = (float(state(browser)[name]) for name in ("delta", "lambda"))
    score = float(imacs(torch.where(expected > delta, expected, 0.0)[None], mask, penalty))
    assert shown["score"] == pytest.approx(score, abs=SCORE_PRECISION)


VIEWS = [
    ("all", None, None, "paper", 0.4, 3.0),
    ("all", None, None, "density", 0.0, 1.0),
    ("all", None, 2, "density", 0.55, 0.0),
    ("8x6", 1, None, "paper", 0.2, 5.0),
    ("16x12", 0, 0, "density", 0.4, 3.0),
    ("2", None, 1, "paper", 0.7, 3.0),
    ("9", 0, None, "density", 0.4, 2.5),
]
LAYERS = {"all": range(1, 10), "8x6": [4, 5, 6], "16x12": [7, 8, 9], "2": [2], "9": [9]}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("view", VIEWS, ids=lambda view: "-".join(map(str, view)))
def test_maps_are_the_archive_s(
    browser: Any,
    captures: list[list[AttributionMaps]],
    samples: list[TryOnSample],
    side: str,
    view: tuple[str, int | None, int | None, str, float, float],
) -> None:
    """Every layer choice, head, time group and weighting, threshold and penalty, in both directions."""
    layer, head, group, weighting, delta, penalty = view
    changes = {
        "layer": layer,
        "head": "all" if head is None else str(head),
        "time": "all" if group is None else str(group),
        "weighting": weighting,
        "delta": delta,
        "lambda": penalty,
    }
    browser.execute_script("i2am.set(arguments[0])", changes)
    store = captures[1][0].select(LAYERS[layer]).store
    rollup = Rollup(SIDES[side], LayerWeighting(weighting))
    maps = rollup.combine(
        store.layers, rollup.common_grid(store), groups=None if group is None else GROUPS, heads=head is not None
    )
    expected = scored(HeatMap(maps[:, group or 0, head or 0], SIDES[side]))
    assert_shown(browser, expected, mask_of(samples[0], side), (0, 1, side))


@pytest.mark.parametrize(
    ("side", "layer", "cell"),
    [
        ("generated", 2, (1, 2)),
        ("generated", 5, (7, 0)),
        ("generated", 9, (3, 11)),
        ("reference", 2, (0, 5)),
        ("reference", 7, (6, 3)),
    ],
)
def test_maps_of_patches_are_the_archive_s(
    browser: Any,
    captures: list[list[AttributionMaps]],
    samples: list[TryOnSample],
    side: str,
    layer: int,
    cell: tuple[int, int],
) -> None:
    """A generated patch's map on the reference, and a reference patch's on the generated image."""
    maps = captures[0][1]
    grid = maps.store.layer(layer).grid(SIDES[side])
    y, x = ((at + 0.5) / length for at, length in zip(cell, grid, strict=True))
    patch = {"side": side, "y": y, "x": x}
    browser.execute_script("i2am.set({layer: arguments[0], patch: arguments[1]})", str(layer), patch)
    of_patch = (maps.specific_reference if side == "generated" else maps.reverse_specific_reference)([cell], layer)
    expected = scored(HeatMap(of_patch.values[:, 0], of_patch.direction))
    other = "reference" if side == "generated" else "generated"
    assert_shown(browser, expected, mask_of(samples[1], other), (1, 0, other))
    shown = browser.execute_script("return i2am.numbers(1, 0, arguments[0]).map", other)
    scores = of_patch.values[0, 0].flatten().numpy()
    half_step = np.ptp(scores) / (2 * 65535)  # of 16 bits between the map's own ends
    np.testing.assert_allclose(shown, scores, atol=1.01 * half_step, rtol=0)


def test_centres_are_python_s(browser: Any, captures: list[list[AttributionMaps]], samples: list[TryOnSample]) -> None:
    """Attention centres, and their mean distance from the truth, for every sample, model and layer kind."""
    for layer in (2, 5, 8):
        browser.execute_script("i2am.set({layer: arguments[0]})", str(layer))
        for sample, found in enumerate(samples):
            for model, made in enumerate(captures):
                maps = made[sample]
                grid = maps.store.layer(layer).generated_grid
                centers = attention_centers(maps.scores(layer).unflatten(-1, REFERENCE))
                known = (found["correspondence"][None], found["warped_garment_mask"][None])
                error = correspondence_error(centers, target_on_grid(*known, grid, REFERENCE))
                field = browser.execute_script("return i2am.field(...arguments)", sample, model)
                np.testing.assert_allclose(field["centres"], centers[0].numpy(), atol=CENTRE_PRECISION, rtol=0)
                assert field["error"] == pytest.approx(float(error), abs=CENTRE_PRECISION)


def test_what_is_written_is_what_is_measured(browser: Any) -> None:
    """The texts under the pictures are the numbers behind them."""
    for side in SIDES:
        numbers = browser.execute_script("return i2am.numbers(0, 0, arguments[0])", side)
        text = picture(browser, side).find_element("xpath", "..//*[@class='score']").text
        expected = f"{numbers['score']:.3f} = {numbers['inside']:.3f} − 3 × {numbers['outside']:.3f}"
        assert text == f"IMACS{side[0]} {expected}".replace("-", "−")
    error = browser.execute_script("return i2am.field(0, 0).error")
    text = browser.find_element("css selector", ".reference .detail").text
    assert text == f"Layer 2: centres {error:.2f} patches from the truth"


def test_the_page_asks_for_nothing(browser: Any) -> None:
    """From a file, with the data inside."""
    names = browser.execute_script("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert all(name.startswith("data:") for name in names)
    assert browser.current_url.startswith("file://")


@pytest.mark.parametrize("side", SIDES)
def test_pointing_at_a_patch(browser: Any, side: str) -> None:
    """Hovering shows the patch's map on the other picture and leaving takes it away; a click keeps it."""
    other, words = {
        "generated": ("reference", "Where it looks, Layer 2"),
        "reference": ("generated", "What it feeds, Layer 2"),
    }[side]
    heading = browser.find_element("tag name", "h1")
    canvas, shown = picture(browser, side), picture(browser, other)
    caption = shown.find_element("xpath", "../figcaption")
    at_rest = pixels(browser, shown)
    point_at(browser, canvas).perform()
    eventually(browser, lambda: caption.text.startswith(words))
    hovered = pixels(browser, shown)
    assert not same(hovered, at_rest)
    assert state(browser)["patch"] is None
    ActionChains(browser).move_to_element(heading).perform()
    eventually(browser, lambda: same(pixels(browser, shown), at_rest))
    point_at(browser, canvas).click().perform()
    assert state(browser)["patch"]["side"] == side
    ActionChains(browser).move_to_element(heading).perform()
    eventually(browser, lambda: same(pixels(browser, shown), hovered))
    point_at(browser, canvas).click().perform()
    assert state(browser)["patch"] is None


def test_keys_alone(browser: Any) -> None:
    """Tab reaches controls and pictures; arrows move the patch and stop at the border; Escape lets it go."""
    reached = set()
    browser.find_element("name", "direction").send_keys("")
    for _ in range(30):
        active = browser.switch_to.active_element
        reached.add(active.get_attribute("name") or active.get_attribute("class"))
        active.send_keys(Keys.TAB)
    assert {"layer", "time", "weighting", "delta", "lambda", "heat", "field", "picture"} <= reached
    canvas = picture(browser, "generated")
    canvas.send_keys(Keys.ARROW_LEFT)
    grid = (4, 3)  # of layer 2 at this size
    patch = state(browser)["patch"]
    assert (patch["y"] * grid[0], patch["x"] * grid[1]) == pytest.approx((2.5, 1.5))
    canvas.send_keys(*[Keys.ARROW_UP] * 5, Keys.ARROW_RIGHT)
    patch = state(browser)["patch"]
    assert (patch["y"] * grid[0], patch["x"] * grid[1]) == pytest.approx((0.5, 2.5))
    spoken = browser.find_element("id", "status").get_attribute("textContent")
    assert "Patch (0, 2) of 4×3" in spoken
    canvas.send_keys(Keys.ESCAPE)
    assert state(browser)["patch"] is None


def test_controls(browser: Any) -> None:
    """Each control changes what is drawn; heads can be chosen where the layers have equally many.

    The weighting changes nothing on the reference, whose grid is the same in all layers.
    """
    canvases = [picture(browser, side) for side in SIDES]

    def changed(action: Callable[[], object]) -> tuple[bool, bool]:
        before = [pixels(browser, canvas) for canvas in canvases]
        action()
        generated, reference = (
            not same(old, pixels(browser, canvas)) for old, canvas in zip(before, canvases, strict=True)
        )
        return generated, reference

    def click(name: str) -> Callable[[], object]:
        return browser.find_element("name", name).click

    def slide(name: str) -> Callable[[], object]:
        return lambda: browser.find_element("name", name).send_keys(Keys.ARROW_UP * 9)

    heads = browser.find_element("name", "head")
    assert not heads.is_enabled()
    assert changed(lambda: choose(browser, "weighting", "density")) == (True, False)
    assert changed(lambda: choose(browser, "time", "1")) == (True, True)
    assert changed(lambda: choose(browser, "layer", "4")) == (True, True)
    assert heads.is_enabled()
    assert changed(lambda: choose(browser, "head", "1")) == (True, True)
    assert changed(slide("delta")) == (True, True)
    assert state(browser)["delta"] == pytest.approx(0.49)
    score = browser.find_element("css selector", ".generated .score")
    before = score.text
    assert changed(slide("lambda")) == (False, False)
    assert state(browser)["lambda"] == pytest.approx(3.9)
    assert score.text != before
    assert changed(click("mask")) == (True, True)
    assert changed(lambda: choose(browser, "direction", "generated_to_reference")) == (True, False)
    assert changed(click("field")) == (False, True)
    assert changed(click("truth")) == (False, True)
    choose(browser, "layer", "all")
    assert state(browser)["head"] == "all"
    browser.find_element("id", "reset").click()
    visited = state(browser)
    assert (visited["layer"], visited["weighting"], visited["delta"]) == ("all", "paper", 0.4)


def test_a_link_restores_the_view(browser: Any, file: Path) -> None:
    """The address and the page's link hold the whole view; what they cannot mean is passed over."""
    changes = {
        "direction": "reference_to_generated",
        "layer": "16x12",
        "head": "1",
        "time": "2",
        "weighting": "density",
        "delta": 0.25,
        "lambda": 1.5,
        "heat": False,
        "mask": False,
        "field": True,
        "truth": False,
        "samples": [0, 1],
        "models": [1],
        "patch": {"side": "reference", "y": 0.1875, "x": 0.75},
    }
    browser.execute_script("i2am.set(arguments[0])", changes)
    wanted = state(browser)
    assert {name: wanted[name] for name in changes} == changes
    link = browser.find_element("id", "link").get_attribute("href")
    eventually(browser, lambda: browser.current_url == link)
    drawn = pixels(browser, picture(browser, "generated", 1, 1))
    visit(browser, file, link.split("#")[1])
    assert state(browser) == wanted
    assert same(pixels(browser, picture(browser, "generated", 1, 1)), drawn)
    visit(browser, file, "layer=77&head=x&delta=7&lambda=&samples=9&patch=sky,1,2&foo=bar&time=")
    broken = state(browser)
    visit(browser, file)
    assert broken == state(browser)


def test_samples_and_models_side_by_side(browser: Any) -> None:
    """Boxes choose which are shown; the last one stays; a patch is asked on all of them at once."""

    def shown() -> set[tuple[int, int]]:
        return {
            (sample, model)
            for sample in range(2)
            for model in range(2)
            if picture(browser, "generated", sample, model).is_displayed()
        }

    def box(name: str, value: int) -> Any:
        return browser.find_element("css selector", f"input[name={name}][value='{value}']")

    assert shown() == {(0, 0), (0, 1)}
    tops = {picture(browser, "generated", 0, model).location["y"] for model in (0, 1)}
    assert len(tops) == 1
    box("samples", 1).click()
    assert shown() == {(0, 0), (0, 1), (1, 0), (1, 1)}
    before = [pixels(browser, picture(browser, "reference", 1, model)) for model in (0, 1)]
    picture(browser, "generated").click()
    after = [pixels(browser, picture(browser, "reference", 1, model)) for model in (0, 1)]
    assert not same(before[0], after[0])
    assert not same(before[1], after[1])
    box("models", 0).click()
    box("samples", 0).click()
    assert shown() == {(1, 1)}
    box("samples", 1).click()
    assert shown() == {(1, 1)}


def test_phone(browser: Any, file: Path) -> None:
    """At 390 pixels nothing is cut off, both pictures fit side by side, and a tap asks a patch."""
    phone = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        visit(browser, file)
        width, content = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert (width, content) == (390, 390)
        boxes = [picture(browser, side).rect for side in SIDES]
        assert boxes[0]["y"] == boxes[1]["y"]
        assert boxes[0]["x"] + boxes[0]["width"] < boxes[1]["x"]
        assert boxes[1]["x"] + boxes[1]["width"] <= 390
        assert boxes[1]["y"] + boxes[1]["height"] < 844
        assert not browser.find_element("name", "layer").is_displayed()
        before = pixels(browser, picture(browser, "reference"))
        point = {"x": boxes[0]["x"] + 60, "y": boxes[0]["y"] + 90}
        for kind, points in (("touchStart", [point]), ("touchEnd", [])):
            browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
        eventually(browser, lambda: state(browser)["patch"])
        assert state(browser)["patch"]["side"] == "generated"
        assert not same(pixels(browser, picture(browser, "reference")), before)
        browser.find_element("css selector", "#fold summary").click()
        assert browser.find_element("name", "layer").is_displayed()
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
