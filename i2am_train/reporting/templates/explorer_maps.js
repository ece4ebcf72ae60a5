/* The numbers of the explorer: maps, scores and centres from packed attention. No page, no state.

   The same definitions as i2am_train/attention/maps, metrics/attention and losses/attention;
   tests/end_to_end/test_explorer.py compares them. A map is a Float64Array, row by row; a grid or
   size is [height, width]; a position is [y, x]. */

const FLOAT32_EPSILON = 2 ** -23;
const ROUNDING = 16; // units of the last place within which a map is constant

function bytesOf(base64) {
  return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0));
}

function floatsOf(base64) {
  return new Float32Array(bytesOf(base64).buffer);
}

/** Booleans packed eight to a byte, the first one in the highest bit. */
function maskOf(base64, count) {
  const bytes = bytesOf(base64);
  return Uint8Array.from({ length: count }, (_, i) => (bytes[i >> 3] >> (7 - (i & 7))) & 1);
}

/** Maps of 16 bits, each between its own minimum and maximum; unpacked when first asked for. */
class PackedMaps {
  constructor(packed, tokens) {
    this.packed = packed;
    this.tokens = tokens;
  }

  at(index) {
    this.units ??= new Uint16Array(bytesOf(this.packed.units).buffer);
    this.low ??= floatsOf(this.packed.low);
    this.step ??= floatsOf(this.packed.step);
    const start = index * this.tokens;
    const units = this.units.subarray(start, start + this.tokens);
    return Float64Array.from(units, (unit) => this.low[index] + unit * this.step[index]);
  }
}

function extremes(map) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of map) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/** Min-max to [0, 1]; a map that is constant (to rounding in float32) becomes zeros. */
function normalise(map) {
  const [low, high] = extremes(map);
  const rounding = ROUNDING * FLOAT32_EPSILON * Math.max(Math.abs(low), Math.abs(high));
  if (high - low <= rounding) return new Float64Array(map.length);
  return map.map((value) => (value - low) / (high - low));
}

/** For each new cell: the two old cells that it lies between, and the share of the second. */
function neighbours(from, to) {
  return Array.from({ length: to }, (_, i) => {
    const at = Math.max(((i + 0.5) * from) / to - 0.5, 0);
    const first = Math.floor(at);
    return [first, Math.min(first + 1, from - 1), at - first];
  });
}

/** Bilinear with half-pixel centres and no antialiasing, as torch's align_corners=False. */
function resize(map, [height, width], [newHeight, newWidth]) {
  if (height === newHeight && width === newWidth) return map;
  const rows = neighbours(height, newHeight);
  const columns = neighbours(width, newWidth);
  const resized = new Float64Array(newHeight * newWidth);
  let at = 0;
  for (const [top, bottom, down] of rows) {
    for (const [left, right, across] of columns) {
      const above = map[top * width + left] * (1 - across) + map[top * width + right] * across;
      const below = map[bottom * width + left] * (1 - across) + map[bottom * width + right] * across;
      resized[at++] = above * (1 - down) + below * down;
    }
  }
  return resized;
}

/** What scores are defined on: normalised, at image size, normalised again. */
function scoredMap(map, grid, size) {
  return normalise(resize(normalise(map), grid, size));
}

/** Mean above the threshold inside the mask minus `penalty` times that outside (paper eq. 8). */
function imacs(map, mask, delta, penalty) {
  const sums = [0, 0];
  const counts = [0, 0];
  map.forEach((value, i) => {
    counts[mask[i]] += 1;
    if (value > delta) sums[mask[i]] += value;
  });
  const inside = sums[1] / counts[1]; // NaN for an empty mask: there is no score
  const outside = counts[0] ? sums[0] / counts[0] : 0;
  return { inside, outside, score: inside - penalty * outside };
}

/** Adds `weight` times a map to a sum. */
function accumulate(sum, map, weight) {
  for (let i = 0; i < sum.length; i++) sum[i] += weight * map[i];
}

/** One layer's mean over the chosen time group and head, or over all (null), on its own grid.
    `layer` is {maps: PackedMaps of [group, head], heads, grid}; `steps` are the groups' lengths. */
function layerMap(layer, steps, group, head) {
  const groups = group === null ? [...steps.keys()] : [group];
  const heads = head === null ? [...Array(layer.heads).keys()] : [head];
  const allSteps = groups.reduce((total, at) => total + steps[at], 0);
  const mean = new Float64Array(layer.maps.tokens);
  for (const at of groups) {
    const weight = steps[at] / allSteps / heads.length;
    for (const one of heads) accumulate(mean, layer.maps.at(at * layer.heads + one), weight);
  }
  return mean;
}

/** Mean over layers on the finest of their grids; a layer counts once per head. With `density`
    weighting it also counts once per token, so that coarse layers do not outweigh fine ones. */
function unifiedMap(layers, steps, { group, head, weighting }) {
  const tokens = ([height, width]) => height * width;
  const grids = layers.map((layer) => layer.grid);
  const grid = grids.reduce((best, other) => (tokens(other) > tokens(best) ? other : best));
  const heads = layers.reduce((total, layer) => total + layer.heads, 0);
  const mean = new Float64Array(tokens(grid));
  for (const layer of layers) {
    const density = weighting === "density" ? tokens(layer.grid) : 1;
    const map = resize(layerMap(layer, steps, group, head), layer.grid, grid);
    accumulate(mean, map, (density * layer.heads) / heads);
  }
  return { map: mean, grid };
}

/** Centre of mass of a map, [y, x] in patches from 0 (paper eq. 15). */
function centreOf(map, [, width]) {
  let y = 0;
  let x = 0;
  map.forEach((value, i) => {
    y += value * Math.floor(i / width);
    x += value * (i % width);
  });
  return [y, x];
}

function distance([y0, x0], [y1, x1]) {
  return Math.hypot(y0 - y1, x0 - x1);
}

function median(values) {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Pairs of neighbouring patches that `has` contains. Where the truth is known, pairs that it puts
    more than `tear` medians apart are left out: a sleeve before the body is no neighbour of it. */
function meshEdges(has, [height, width], targets, tear) {
  const pairs = [];
  for (let i = 0; i < height * width; i++) {
    if (!has(i)) continue;
    if ((i + 1) % width && has(i + 1)) pairs.push([i, i + 1]);
    if (i + width < height * width && has(i + width)) pairs.push([i, i + width]);
  }
  if (!targets || !pairs.length) return pairs;
  const lengths = pairs.map(([a, b]) => distance(targets[a], targets[b]));
  const limit = tear * median(lengths);
  return pairs.filter((_, i) => lengths[i] <= limit);
}
