/* The explorer's page: state, controls, pictures. Numbers come from explorer_maps.js.

   `state` is the whole view: controls write it, `render` draws it, the address keeps it. A patch is
   {side, y, x} with its place in fractions of the picture, so that it survives a change of layer. */

const page = JSON.parse(document.getElementById("page-data").textContent);
const SIDES = ["generated", "reference"];
/** Sides that have maps: not the reference if its tokens have no place in the picture. */
const MAPPED = SIDES.filter((side) => page.layers.every((layer) => layer.grids[side]));
const OTHER = { generated: "reference", reference: "generated" };
const DIRECTION = { generated: "reference_to_generated", reference: "generated_to_reference" };
const PALE = 0.3; // opacity of values below the threshold, relative to those above
const steps = page.groups.map((group) => group.steps);
const palette = { full: pixelColors(1), pale: pixelColors(PALE) };
const form = document.getElementById("controls");
const byId = (id) => document.getElementById(id);

const DEFAULTS = Object.freeze({
  direction: "both",
  layer: "all",
  head: "all",
  time: "all",
  weighting: page.options.weighting,
  delta: page.options.delta,
  lambda: page.options.penalty,
  heat: true,
  mask: true,
  field: false,
  truth: true,
  samples: [0],
  models: page.models.map((_, i) => i),
  patch: null,
});
const NUMBERS = { delta: [0, 0.99], lambda: [0, 10] };
const SWITCHES = ["heat", "mask", "field", "truth"];
const CHOICES = ["direction", "layer", "head", "time", "weighting"];
const LISTS = ["samples", "models"];

let state = { ...DEFAULTS };
let writing = 0; // timer of the address
let hovered = null; // a patch under the mouse; it comes before the pinned one

/** The 256 colours of the heat map as pixels, with their opacity times a factor. */
function pixelColors(opacity) {
  const bytes = bytesOf(page.palette);
  for (let i = 3; i < bytes.length; i += 4) bytes[i] *= opacity;
  return new Uint32Array(bytes.buffer);
}

// ---- state and address -------------------------------------------------------------------------

/** The view as the part of the address after #; what is as it was at first is left out. */
function toFragment(view) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(view)) {
    if (name === "patch" || String(value) === String(DEFAULTS[name])) continue;
    words.set(name, SWITCHES.includes(name) ? Number(value) : value);
  }
  if (view.patch) {
    const { side, y, x } = view.patch;
    words.set("patch", [side, y.toFixed(4), x.toFixed(4)]);
  }
  return words.toString().replaceAll("%2C", ",");
}

/** The view that a fragment means; words that it cannot mean are passed over. */
function fromFragment(text) {
  const view = { ...DEFAULTS };
  for (const [name, word] of new URLSearchParams(text)) {
    const value = readWord(name, word);
    if (value !== undefined) view[name] = value;
  }
  return view;
}

function readWord(name, word) {
  if (name in NUMBERS) {
    const [low, high] = NUMBERS[name];
    return word !== "" && word >= low && word <= high ? Number(word) : undefined;
  }
  if (SWITCHES.includes(name)) return word === "1";
  if (CHOICES.includes(name)) {
    return [...form.elements[name].options].some((option) => option.value === word) ? word : undefined;
  }
  if (LISTS.includes(name)) {
    const chosen = word.split(",").map(Number).filter((at) => at in page[name]);
    return chosen.length ? chosen : undefined;
  }
  if (name === "patch") {
    const [side, y, x] = word.split(",");
    const inside = (at) => at >= 0 && at < 1;
    return MAPPED.includes(side) && inside(y) && inside(x) ? { side, y: +y, x: +x } : undefined;
  }
  return undefined;
}

/** Changes part of the view, and draws and keeps it. */
function set(changes) {
  const next = { ...state, ...changes };
  for (const name of LISTS) if (!next[name].length) next[name] = state[name];
  if (next.head !== "all" && +next.head >= commonHeads(next)) next.head = "all";
  state = next;
  keepAddress(`#${toFragment(state)}`);
  showControls();
  render();
  byId("status").textContent = spoken();
}

/** The address follows when the controls rest: browsers refuse to change it many times a second. */
function keepAddress(link) {
  byId("link").href = link;
  clearTimeout(writing);
  writing = setTimeout(() => history.replaceState(null, "", link), 200);
}

// ---- layers ------------------------------------------------------------------------------------

function gridName([height, width]) {
  return `${height}×${width}`;
}

function resolution(layer) {
  return layer.grids.generated.join("x");
}

/** Layers by number that a choice means: all, those of one resolution, or one. */
function chosenLayers(view = state) {
  const every = [...page.layers.keys()];
  if (view.layer === "all") return every;
  return every.filter((i) => [page.layers[i].key, resolution(page.layers[i])].includes(view.layer));
}

/** How many heads the chosen layers have; 0 if they differ, as heads then have no common number. */
function commonHeads(view) {
  const counts = new Set(chosenLayers(view).map((i) => page.layers[i].heads));
  return counts.size === 1 ? [...counts][0] : 0;
}

/** The layer of single patches and centres: of the chosen ones with a matrix, else the default. */
function patchLayer() {
  const usual = page.options.patch_layer;
  const possible = chosenLayers().filter((i) => page.layers[i].matrix);
  return possible.includes(usual) || !possible.length ? usual : possible[0];
}

/** Row, column and number of the cell of a patch on a side of the layer of single patches. */
function cellOf(patch, side = patch.side) {
  const [height, width] = page.layers[patchLayer()].grids[side];
  const row = Math.floor(patch.y * height);
  const column = Math.floor(patch.x * width);
  return { row, column, index: row * width + column };
}

/** The patch in the middle of a cell. */
function patchAt(side, row, column) {
  const [height, width] = page.layers[patchLayer()].grids[side];
  return { side, y: (row + 0.5) / height, x: (column + 0.5) / width };
}

function positionOf(index, [, width]) {
  return [Math.floor(index / width), index % width];
}

// ---- captures: one model's attention on one sample -----------------------------------------------

class Capture {
  constructor(sample, packed) {
    this.truth = sample.layers;
    const tokens = ([height, width]) => height * width;
    const mask = (side) => sample.masks[side] && maskOf(sample.masks[side], tokens(page.sizes[side]));
    this.masks = Object.fromEntries(SIDES.map((side) => [side, mask(side)]));
    this.layers = packed.layers.map((layer, i) => {
      const { generated, reference } = page.layers[i].grids;
      const open = (maps, grid) => (maps ? new PackedMaps(maps, tokens(grid)) : null);
      return {
        generated: open(layer.generated, generated),
        reference: open(layer.reference, reference),
        looks: open(layer.looks, reference),
        feeds: open(layer.feeds, generated),
      };
    });
    this.kept = {};
  }

  /** The map of a side under the current controls: {map, grid, values, score, inside, outside}, the
      scores only where there is a mask; null for a side without maps. */
  view(side, patch) {
    if (!MAPPED.includes(side)) return null;
    const alone = patch && patch.side !== side;
    const found = alone ? this.ofPatch(side, patch) : this.unified(side);
    const mask = this.masks[side];
    return mask ? { ...found, ...imacs(found.values, mask, state.delta, state.lambda) } : found;
  }

  unified(side) {
    const { layer, head, time, weighting } = state;
    const key = [layer, head, time, weighting].join();
    if (this.kept[side]?.key === key) return this.kept[side];
    const number = (word) => (word === "all" ? null : Number(word));
    const layers = chosenLayers().map((i) => ({
      maps: this.layers[i][side],
      heads: page.layers[i].heads,
      grid: page.layers[i].grids[side],
    }));
    const choice = { group: number(time), head: number(head), weighting };
    const { map, grid } = unifiedMap(layers, steps, choice);
    this.kept[side] = { key, map, grid, values: scoredMap(map, grid, page.sizes[side]) };
    return this.kept[side];
  }

  ofPatch(side, patch) {
    const at = patchLayer();
    const grid = page.layers[at].grids[side];
    const map = this.layers[at][side === "reference" ? "looks" : "feeds"].at(cellOf(patch).index);
    return { map, grid, values: scoredMap(map, grid, page.sizes[side]) };
  }

  /** Attention centre of every generated patch of a layer, and its true position or null. */
  field(at = patchLayer()) {
    this.fields ??= {};
    this.fields[at] ??= this.makeField(at);
    return this.fields[at];
  }

  makeField(at) {
    const { generated, reference } = page.layers[at].grids;
    const count = generated[0] * generated[1];
    const target = floatsOf(this.truth[at].target);
    const onGarment = maskOf(this.truth[at].on_garment, count);
    const all = [...Array(count).keys()];
    const centres = all.map((i) => centreOf(this.layers[at].looks.at(i), reference));
    const truth = all.map((i) =>
      Number.isFinite(target[2 * i]) ? [target[2 * i], target[2 * i + 1]] : null,
    );
    const known = all.filter((i) => truth[i]);
    const patches = known.length ? known.filter((i) => onGarment[i]) : all.filter((i) => onGarment[i]);
    const shown = new Set(patches);
    const targets = known.length ? truth : null;
    const edges = meshEdges((i) => shown.has(i), generated, targets, page.tear);
    const off = known.map((i) => distance(centres[i], truth[i]));
    const error = known.length ? off.reduce((sum, one) => sum + one, 0) / known.length : null;
    return { centres, truth: targets, patches, edges, error };
  }
}

// ---- pictures ------------------------------------------------------------------------------------

/** A copy of a picture in grey, mixed with white, to draw on. */
function faded(picture, strength, [height, width]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  context.drawImage(picture, 0, 0, width, height);
  const image = context.getImageData(0, 0, width, height);
  for (let i = 0; i < image.data.length; i += 4) {
    const [red, green, blue] = image.data.subarray(i, i + 3);
    const grey = 0.299 * red + 0.587 * green + 0.114 * blue;
    image.data.fill(grey * (1 - strength) + 255 * strength, i, i + 3);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The heat map as a picture: transparent at 0, and pale below the threshold. */
function heatPicture(values, [height, width]) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d");
  const image = context.createImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  values.forEach((value, i) => {
    const colors = value > state.delta ? palette.full : palette.pale;
    pixels[i] = colors[Math.round(value * 255)];
  });
  context.putImageData(image, 0, 0);
  return canvas;
}

/** The border of a mask as a path in pixels; where it meets the picture's border there is none. */
function outline(mask, [height, width]) {
  const path = new Path2D();
  const line = (y0, x0, y1, x1) => {
    path.moveTo(x0, y0);
    path.lineTo(x1, y1);
  };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const at = y * width + x;
      if (y && mask[at] !== mask[at - width]) line(y, x, y, x + 1);
      if (x && mask[at] !== mask[at - 1]) line(y, x, y + 1, x);
    }
  }
  return path;
}

/** One picture of a card: draws itself and listens to mouse, finger and keys. */
class Picture {
  constructor(card, side, source, figure) {
    const size = page.sizes[side];
    Object.assign(this, { card, side, size, figure, canvas: figure.querySelector("canvas") });
    this.lines = Object.fromEntries(
      ["what", "score", "detail"].map((name) => [name, figure.querySelector(`.${name}`)]),
    );
    this.canvas.style.aspectRatio = `${size[1]} / ${size[0]}`;
    this.canvas.setAttribute("aria-label", `${card.title}, ${side} picture`);
    const mask = card.capture.masks[side];
    this.path = mask && outline(mask, size);
    this.image = new Image();
    this.ready = new Promise((done) => this.image.addEventListener("load", done));
    this.image.src = source;
    this.listen();
  }

  listen() {
    this.canvas.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") hover(this.patchUnder(event));
    });
    this.canvas.addEventListener("pointerleave", () => hover(null));
    this.canvas.addEventListener("click", (event) => this.toggle(this.patchUnder(event)));
    this.canvas.addEventListener("keydown", (event) => this.key(event));
    new ResizeObserver(() => this.card.draw()).observe(this.canvas);
  }

  /** The cell under the pointer, or null on a picture without maps. */
  patchUnder(event) {
    if (!MAPPED.includes(this.side)) return null;
    const box = this.canvas.getBoundingClientRect();
    const inside = (at) => Math.min(Math.max(at, 0), 1 - 1e-9);
    const y = inside((event.clientY - box.top) / box.height);
    const x = inside((event.clientX - box.left) / box.width);
    const { row, column } = cellOf({ side: this.side, y, x });
    return patchAt(this.side, row, column);
  }

  toggle(patch) {
    if (!patch) return;
    const old = state.patch;
    const same = old?.side === this.side && cellOf(old).index === cellOf(patch).index;
    hovered = null;
    set({ patch: same ? null : patch });
  }

  /** Arrows move the patch, and choose the middle one at first; Escape lets it go. */
  key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") set({ patch: null });
    if (!(event.key in moves) || !MAPPED.includes(this.side)) return;
    event.preventDefault();
    const [height, width] = page.layers[patchLayer()].grids[this.side];
    const old = state.patch?.side === this.side ? state.patch : null;
    const { row, column } = cellOf(old ?? { side: this.side, y: 0.5, x: 0.5 });
    const [down, right] = old ? moves[event.key] : [0, 0];
    const within = (at, size) => Math.min(Math.max(at, 0), size - 1);
    hovered = null;
    set({ patch: patchAt(this.side, within(row + down, height), within(column + right, width)) });
  }

  /** Begins a drawing in pixels of the picture; `unit` is one pixel of the screen. */
  start() {
    const ratio = window.devicePixelRatio || 1;
    const width = Math.round(this.canvas.clientWidth * ratio);
    const [pixelsHigh, pixelsWide] = this.size;
    const height = Math.round((width * pixelsHigh) / pixelsWide);
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height });
    }
    this.context = this.canvas.getContext("2d");
    this.context.setTransform(width / pixelsWide, 0, 0, height / pixelsHigh, 0, 0);
    this.context.imageSmoothingQuality = "high";
    this.context.lineCap = "round";
    this.unit = (pixelsWide / width) * ratio;
  }

  background(kind) {
    const fading = { map: 0.45, field: 0.35 }[kind];
    this.grey ??= {};
    if (fading) this.grey[kind] ??= faded(this.image, fading, this.size);
    this.fill(this.grey[kind] ?? this.image);
  }

  heat(values) {
    this.fill(heatPicture(values, this.size));
  }

  fill(picture) {
    const [height, width] = this.size;
    this.context.drawImage(picture, 0, 0, width, height);
  }

  /** A line twice, dark and wide below: it can be seen on any picture. */
  cased(color, width, trace) {
    for (const [style, extra] of [["#000000a0", 2], [color, 0]]) {
      this.context.strokeStyle = style;
      this.context.lineWidth = (width + extra) * this.unit;
      trace(this.context);
    }
  }

  mask() {
    if (this.path) this.cased(page.colors.mask, 1.5, (context) => context.stroke(this.path));
  }

  cell({ row, column }) {
    const [height, width] = page.layers[patchLayer()].grids[this.side];
    const [h, w] = [this.size[0] / height, this.size[1] / width];
    this.cased("#ffffff", 2.5, (context) => context.strokeRect(column * w, row * h, w, h));
  }

  /** Pixel of a position in patches of this side. */
  place([y, x]) {
    const [height, width] = page.layers[patchLayer()].grids[this.side];
    return [((x + 0.5) * this.size[1]) / width, ((y + 0.5) * this.size[0]) / height];
  }

  segments(pairs, color, width, opacity) {
    this.context.globalAlpha = opacity;
    this.context.strokeStyle = color;
    this.context.lineWidth = width * this.unit;
    this.context.beginPath();
    for (const [from, to] of pairs) {
      this.context.moveTo(...this.place(from));
      this.context.lineTo(...this.place(to));
    }
    this.context.stroke();
    this.context.globalAlpha = 1;
  }

  ring(position, radius, color) {
    const [x, y] = this.place(position);
    this.cased(color, 2, (context) => {
      context.beginPath();
      context.arc(x, y, radius * this.unit, 0, 2 * Math.PI);
      context.stroke();
    });
  }

  dot(position, radius, color) {
    const [x, y] = this.place(position);
    this.context.beginPath();
    this.context.arc(x, y, radius * this.unit, 0, 2 * Math.PI);
    this.context.fillStyle = color;
    this.context.fill();
    this.context.strokeStyle = "#ffffff";
    this.context.lineWidth = this.unit;
    this.context.stroke();
  }

  /** The mesh of attention centres over that of the truth. */
  mesh({ centres, truth, patches, edges }, color) {
    const weight = patches.length > 80 ? 0.6 : 1;
    if (truth && state.truth) {
      this.segments(edges.map(([a, b]) => [truth[a], truth[b]]), page.colors.truth, 2 * weight, 1);
      this.segments(patches.map((i) => [truth[i], centres[i]]), color, weight, 0.45);
    }
    this.segments(edges.map(([a, b]) => [centres[a], centres[b]]), color, 2.2 * weight, 1);
    for (const i of patches) this.dot(centres[i], 4 * weight, color);
  }
}

// ---- cards: one model on one sample --------------------------------------------------------------

class Card {
  constructor(sample, model, element) {
    const captured = page.captures[model][sample];
    this.sample = sample;
    this.model = model;
    this.color = page.colors.models[model];
    this.title = `${page.models[model]}, ${page.samples[sample].name}`;
    this.capture = new Capture(page.samples[sample], captured);
    const sources = { generated: captured.picture, reference: page.samples[sample].picture };
    this.pictures = SIDES.map(
      (side) => new Picture(this, side, sources[side], element.querySelector(`.${side}`)),
    );
    this.element = element;
    this.ready = Promise.all(this.pictures.map((picture) => picture.ready));
    this.ready.then(() => {
      this.loaded = true;
      this.draw();
    });
  }

  draw() {
    this.element.hidden = !state.models.includes(this.model);
    if (!this.loaded || !this.pictures[0].canvas.clientWidth) return;
    const patch = hovered ?? state.patch;
    for (const picture of this.pictures) {
      const view = this.capture.view(picture.side, patch);
      picture.start();
      this.drawPicture(picture, view, patch);
      this.write(picture, view, patch);
    }
  }

  drawPicture(picture, view, patch) {
    const kind = this.kind(picture.side, patch);
    picture.background(kind);
    if (kind === "map") picture.heat(view.values);
    if (state.mask) picture.mask();
    if (kind === "field") picture.mesh(this.capture.field(), this.color);
    if (patch?.side === picture.side) picture.cell(cellOf(patch));
    else if (patch && view) this.mark(picture, patch);
  }

  /** What a picture shows: itself, a map, or the field of centres. */
  kind(side, patch) {
    if (patch?.side === side || !MAPPED.includes(side)) return "picture";
    if (patch) return state.heat ? "map" : "picture";
    if (state.field && side === "reference") return "field";
    return state.heat && ["both", DIRECTION[side]].includes(state.direction) ? "map" : "picture";
  }

  /** Beside a patch's map: its centre, and where it truly belongs. */
  mark(picture, patch) {
    const { centres, truth, patches } = this.capture.field();
    const { row, column, index } = cellOf(patch);
    if (picture.side === "reference") {
      if (truth?.[index] && state.truth) {
        picture.segments([[truth[index], centres[index]]], "#ffffff", 1.5, 0.9);
        picture.ring(truth[index], 8, "#ffffff");
      }
      picture.dot(centres[index], 5, this.color);
    } else if (truth && state.truth) {
      const grid = page.layers[patchLayer()].grids.generated;
      const here = ([y, x]) => Math.round(y) === row && Math.round(x) === column;
      for (const i of patches) if (here(truth[i])) picture.ring(positionOf(i, grid), 6, "#ffffff");
    }
  }

  /** The three lines under a picture. */
  write({ side, lines }, view, patch) {
    if (!view) {
      lines.what.textContent = "Reference";
      lines.detail.textContent = "its tokens have no place in the picture: there is no map on it";
      return;
    }
    const own = patch?.side === side;
    lines.what.textContent = mapTitle(side, own ? null : patch);
    lines.score.replaceChildren(...scoreText(side, view));
    lines.detail.textContent = own
      ? `${patchTitle(patch)}: map ${number(valueAt(view.values, patch, page.sizes[side]), 3)}`
      : this.detail(side, view, patch);
  }

  detail(side, view, patch) {
    if (side === "generated" && !patch) return "hover, tap or use arrow keys";
    const label = page.layers[patchLayer()].label;
    const { error, centres, truth } = this.capture.field();
    if (patch) {
      const peak = view.map.reduce((best, value, i) => (value > view.map[best] ? i : best), 0);
      const text = `peak ${number(view.map[peak], 4)} at (${positionOf(peak, view.grid).join(", ")})`;
      const { index } = cellOf(patch);
      if (side === "generated" || !truth?.[index]) return text;
      return `${text}; centre ${number(distance(centres[index], truth[index]), 2)} patches from the truth`;
    }
    return error === null ? "" : `${label}: centres ${number(error, 2)} patches from the truth`;
  }
}

function number(value, digits) {
  return Number.isNaN(value) ? "–" : value.toFixed(digits).replace("-", "−");
}

function valueAt(values, { y, x }, [height, width]) {
  return values[Math.floor(y * height) * width + Math.floor(x * width)];
}

function patchTitle(patch) {
  const { row, column } = cellOf(patch);
  const layer = page.layers[patchLayer()];
  return `Patch (${row}, ${column}) of ${gridName(layer.grids[patch.side])}`;
}

function mapTitle(side, patch) {
  if (!patch) return side === "generated" ? "Reference → generated" : "Generated → reference";
  const layer = page.layers[patchLayer()].label;
  return side === "reference" ? `Where it looks, ${layer}` : `What it feeds, ${layer}`;
}

/** "IMACS_g 0.245 = 0.614 − 3 × 0.123" with the index set low. */
function scoreText(side, { score, inside, outside }) {
  if (score === undefined) return ["no mask, no score"];
  const index = document.createElement("sub");
  index.textContent = side[0];
  const value = document.createElement("b");
  value.textContent = number(score, 3);
  const terms = document.createElement("span");
  terms.className = "terms";
  terms.textContent = ` = ${number(inside, 3)} − ${state.lambda} × ${number(outside, 3)}`;
  return ["IMACS", index, " ", value, terms];
}

// ---- the page ------------------------------------------------------------------------------------

const cards = [];

function hover(patch) {
  if (JSON.stringify(patch) === JSON.stringify(hovered)) return;
  hovered = patch;
  render();
}

function render() {
  for (const [i, section] of document.querySelectorAll(".sample").entries()) {
    section.hidden = !state.samples.includes(i);
  }
  for (const card of cards) if (state.samples.includes(card.sample)) card.draw();
}

/** Puts the state into the controls. */
function showControls() {
  const controls = form.elements;
  for (const name of CHOICES) controls[name].value = state[name];
  for (const name of Object.keys(NUMBERS)) {
    controls[name].value = state[name];
    byId(`${name}-value`).textContent = state[name].toFixed(name === "delta" ? 2 : 1);
  }
  for (const name of SWITCHES) controls[name].checked = state[name];
  for (const box of form.querySelectorAll("input[name=samples], input[name=models]")) {
    box.checked = state[box.name].includes(+box.value);
  }
  const heads = commonHeads(state);
  for (const option of controls.head.options) {
    option.disabled = option.value !== "all" && +option.value >= heads;
  }
  controls.head.disabled = !heads;
  byId("heads-note").hidden = heads > 0;
  byId("settings").textContent = settings();
  drawScale();
}

/** The controls' values in one line. */
function settings() {
  const word = (name) => form.elements[name].selectedOptions[0].textContent.trim();
  return [word("layer"), word("time"), `δ ${state.delta}`, `λ ${state.lambda}`].join(" · ");
}

/** The colour bar: what heatPicture makes of 0 to 1. */
function drawScale() {
  const canvas = byId("scale");
  const context = canvas.getContext("2d");
  const values = Float64Array.from({ length: canvas.width }, (_, i) => i / (canvas.width - 1));
  context.clearRect(0, 0, canvas.width, canvas.height);
  context.drawImage(heatPicture(values, [1, canvas.width]), 0, 0, canvas.width, canvas.height);
}

/** What a screen reader says after a change: the first card shown, in words. */
function spoken() {
  const card = cards.find(({ sample, model }) =>
    state.samples.includes(sample) && state.models.includes(model));
  const { patch } = state;
  const texts = MAPPED.map((side) => {
    const view = card.capture.view(side, patch);
    const title = patch?.side === side ? patchTitle(patch) : mapTitle(side, patch);
    const score = view.score === undefined ? "" : `: IMACS ${side[0]} ${number(view.score, 3)}`;
    return `${title}${score}`;
  });
  return `${card.title}. ${texts.join(". ")}.`;
}

function readControls() {
  const controls = form.elements;
  const checked = (name) =>
    [...form.querySelectorAll(`input[name=${name}]:checked`)].map((box) => +box.value);
  return {
    ...Object.fromEntries(CHOICES.map((name) => [name, controls[name].value])),
    ...Object.fromEntries(Object.keys(NUMBERS).map((name) => [name, +controls[name].value])),
    ...Object.fromEntries(SWITCHES.map((name) => [name, controls[name].checked])),
    ...Object.fromEntries(LISTS.map((name) => [name, checked(name)])),
  };
}

function start() {
  for (const element of document.querySelectorAll(".capture")) {
    cards.push(new Card(+element.dataset.sample, +element.dataset.model, element));
  }
  const narrow = window.matchMedia("(max-width: 900px)");
  const fold = () => { byId("fold").open = !narrow.matches; };
  narrow.addEventListener("change", fold);
  fold();
  for (const kind of ["input", "change"]) { // some drivers announce a choice by one of them only
    form.addEventListener(kind, () => set(readControls()));
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  byId("reset").addEventListener("click", () => set(DEFAULTS));
  window.addEventListener("hashchange", () => set(fromFragment(location.hash.slice(1))));
  set(fromFragment(location.hash.slice(1)));
}

start();

/** For scripts and tests: the view, and the numbers behind it. */
window.i2am = {
  set,
  get state() { return state; },
  ready: Promise.all(cards.map((card) => card.ready)),
  numbers(sample, model, side) {
    const { capture } = cards.find((card) => card.sample === sample && card.model === model);
    const view = capture.view(side, hovered ?? state.patch);
    if (!view) return null;
    const { map, grid, values, score, inside, outside } = view;
    return { map: [...map], grid, values: [...values], score, inside, outside };
  },
  field(sample, model) {
    return cards.find((card) => card.sample === sample && card.model === model).capture.field();
  },
};
