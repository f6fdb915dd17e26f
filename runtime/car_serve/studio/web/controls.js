// Control maps derived from a photo, as car_runtime.controls does: Canny to the bit, the others within one grey level.

import { fitted, image, onGround, WHITE } from "./pixels.js";

const HED_SIGMAS = [1, 2]; // pixels
const HED_HALF = 0.25; // the step height that gives a response of one half
const DEPTH_RELIEF = 0.15; // share of blurred brightness, relative to a dome of height 1
const BLUR_SHARE = 1 / 32; // sigma of the blurs in depth and sketch, as a share of the shorter side
const NORMAL_SIGMA = 1; // pixels
const SKETCH_GAIN = 2.5;
const NEEDS_ALPHA = ["depth", "normal"];
const WITHOUT_NETWORK = ["canny", "soft-hed", "dome", "dodge"];

const f32 = Math.fround;
const MAKERS = { canny: cannyMap, hed, depth, normal, sketch };

// {map: RGB of size × size, warnings}. Throws an Error with a sentence.
export function derive(photo, convention, size, fit) {
  const make = MAKERS[convention.control_type];
  if (!make) throw new Error(`'${convention.control_type}' cannot be derived from a photo (only ${Object.keys(MAKERS).join(", ")}); give the control image`);
  const rgba = withAlpha(fitted(photo, size, fit ?? convention.fit, WHITE));
  if (NEEDS_ALPHA.includes(convention.control_type) && rgba.data.every((value, i) => i % 4 !== 3 || value === 255)) {
    throw new Error(`'${convention.name}' is derived from an image's transparency, and this one is opaque; bring a cut-out with an alpha channel, or the map itself`);
  }
  const warnings = WITHOUT_NETWORK.includes(convention.annotator) ? [] : [`${convention.control_type} maps of this plan are those of the network '${convention.annotator}', and this one is derived without it`];
  return { map: make(rgba, convention), warnings };
}

function withAlpha(source) {
  if (source.channels === 4) return source;
  const made = image(source.width, source.height, 4);
  for (let i = 0, j = 0; i < source.data.length; i += 3, j += 4) made.data.set([source.data[i], source.data[i + 1], source.data[i + 2], 255], j);
  return made;
}

// ---- the types -----------------------------------------------------------------------------------------------------

function cannyMap(rgba, convention) {
  const seen = convention.colour === "grey" ? grey(rgba) : onGround(rgba, WHITE);
  return lines(canny(seen, ...convention.thresholds), convention);
}

function lines(map, convention) {
  if (convention.polarity === "dark-on-light") for (let i = 0; i < map.data.length; i++) map.data[i] = 255 - map.data[i];
  return repeated(map);
}

// m²/(m² + HED_HALF²), m the mean over scales σ of σ·√(2π)·|∇(G_σ ∗ I)| in the strongest channel.
function hed(rgba, convention) {
  const rgb = onGround(rgba, WHITE);
  const { width, height } = rgb;
  const channels = [0, 1, 2].map((c) => Float32Array.from({ length: width * height }, (_, i) => f32(rgb.data[3 * i + c] / 255)));
  const m = new Float32Array(width * height);
  for (const sigma of HED_SIGMAS) {
    const slopes = channels.map((channel) => gradient(blur(channel, width, height, sigma), width, height));
    for (let i = 0; i < m.length; i++) {
      const steepest = Math.max(...slopes.map(([gx, gy]) => Math.sqrt(gx[i] * gx[i] + gy[i] * gy[i])));
      m[i] += (sigma * Math.sqrt(2 * Math.PI) * steepest) / HED_SIGMAS.length;
    }
  }
  return lines(toGrey(m.map((v) => (v * v) / (v * v + HED_HALF ** 2)), width, height), convention);
}

function depth(rgba, convention) {
  const near = toGrey(relief(rgba).height, rgba.width, rgba.height);
  if (convention.polarity === "far-is-light") for (let i = 0; i < near.data.length; i++) near.data[i] = 255 - near.data[i];
  return repeated(near);
}

function normal(rgba, convention) {
  const { width, height } = rgba;
  const { height: up, r, mask } = relief(rgba);
  const [gx, gy] = gradient(blur(up.map((v) => v * (r * (1 + DEPTH_RELIEF))), width, height, NORMAL_SIGMA), width, height);
  const made = image(width, height, 3);
  const signs = convention.axes.map((axis) => (axis === "left" || axis === "up" ? -1 : 1));
  for (let i = 0; i < mask.length; i++) {
    const length = Math.sqrt(gx[i] * gx[i] + gy[i] * gy[i] + 1);
    const n = mask[i] ? [-gx[i] / length, -gy[i] / length, 1 / length] : [0, 0, 1];
    for (let c = 0; c < 3; c++) made.data[3 * i + c] = level((n[c] * signs[c] + 1) / 2);
  }
  return made;
}

// Height in 0…1 (dome of radius r plus brightness, over 1 + DEPTH_RELIEF), r in pixels, mask (alpha ≥ 128).
function relief(rgba) {
  const { width, height } = rgba;
  const mask = Uint8Array.from({ length: width * height }, (_, i) => (rgba.data[4 * i + 3] >= 128 ? 1 : 0));
  const d = distanceToOutside(mask, width, height);
  const r = d.reduce((most, v) => Math.max(most, v), 0);
  const bright = blur(Float32Array.from(grey(rgba).data, (v) => v / 255), width, height, BLUR_SHARE * Math.min(width, height));
  const up = d.map((v, i) => (mask[i] * (Math.sqrt(Math.max(v * (2 * r - v), 0)) / Math.max(r, 1) + DEPTH_RELIEF * bright[i])) / (1 + DEPTH_RELIEF));
  return { height: up, r, mask };
}

// SKETCH_GAIN·(1 − dodge), dodge = grey / blur(grey).
function sketch(rgba, convention) {
  const { width, height } = rgba;
  const bright = Float32Array.from(grey(rgba).data, (v) => v / 255);
  const soft = blur(bright, width, height, BLUR_SHARE * Math.min(width, height));
  const made = toGrey(bright.map((v, i) => 1 - SKETCH_GAIN * (1 - Math.min(v / Math.max(soft[i], f32(1 / 255)), 1))), width, height);
  for (let i = 0; i < made.data.length; i++) made.data[i] = 255 - made.data[i];
  return lines(made, convention);
}

// ---- Canny, as OpenCV does it --------------------------------------------------------------------------------------

// Grey or RGB → 255 on edges, else 0; in colour the channel with the largest slope counts, pixel by pixel.
export function canny(source, low, high) {
  const { width, height, channels, data } = source;
  const [dx, dy] = [new Int32Array(width * height), new Int32Array(width * height)];
  const slope = new Int32Array((width + 2) * (height + 2)); // 0 beyond the border
  const row = width + 2;
  const at = (x, y, c) => data[(Math.min(height - 1, Math.max(0, y)) * width + Math.min(width - 1, Math.max(0, x))) * channels + c];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let most = -1;
      for (let c = 0; c < channels; c++) {
        const [nw, n, ne, w, e, sw, s, se] = [at(x - 1, y - 1, c), at(x, y - 1, c), at(x + 1, y - 1, c), at(x - 1, y, c), at(x + 1, y, c), at(x - 1, y + 1, c), at(x, y + 1, c), at(x + 1, y + 1, c)];
        const right = ne - nw + 2 * (e - w) + se - sw;
        const down = sw - nw + 2 * (s - n) + se - ne;
        const steep = Math.abs(right) + Math.abs(down);
        if (steep > most) { most = steep; dx[y * width + x] = right; dy[y * width + x] = down; }
      }
      slope[(y + 1) * row + x + 1] = most;
    }
  }
  const allowed = new Uint8Array(slope.length);
  const front = [];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const i = (y + 1) * row + x + 1;
      if (slope[i] <= low || !onRidge(dx[y * width + x], dy[y * width + x], slope, i, row)) continue;
      allowed[i] = 1;
      if (slope[i] > high) front.push(i);
    }
  }
  const made = image(width, height, 1);
  while (front.length) {
    const i = front.pop();
    if (!allowed[i]) continue;
    allowed[i] = 0;
    made.data[(Math.floor(i / row) - 1) * width + (i % row) - 1] = 255;
    for (const by of [-row - 1, -row, -row + 1, -1, 1, row - 1, row, row + 1]) if (allowed[i + by]) front.push(i + by);
  }
  return made;
}

// Whether the slope is a maximum along the gradient, rounded to one of four directions.
function onRidge(dx, dy, slope, i, row) {
  const y = Math.abs(dy) * 32768;
  const tan22 = Math.abs(dx) * 13573;
  const tan67 = tan22 + Math.abs(dx) * 65536;
  const here = slope[i];
  if (y < tan22) return here > slope[i - 1] && here >= slope[i + 1];
  if (y > tan67) return here > slope[i - row] && here >= slope[i + row];
  return (dx ^ dy) < 0 ? here > slope[i - row + 1] && here > slope[i + row - 1] : here > slope[i - row - 1] && here > slope[i + row + 1];
}

// ---- mathematics ---------------------------------------------------------------------------------------------------

// Euclidean and exact: along columns, then, squared, along rows. Beyond the border is outside.
function distanceToOutside(mask, width, height) {
  const column = new Float64Array(width * height);
  for (let x = 0; x < width; x++) {
    for (let y = 0, run = 0; y < height; y++) column[y * width + x] = run = mask[y * width + x] ? run + 1 : 0;
    for (let y = height - 1, run = 0; y >= 0; y--) column[y * width + x] = run = Math.min(column[y * width + x], run + 1);
  }
  const found = new Float32Array(width * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      let least = Math.min((x + 1) ** 2, (width - x) ** 2);
      for (let u = 0; u < width; u++) least = Math.min(least, (x - u) ** 2 + column[y * width + u] ** 2);
      found[y * width + x] = Math.sqrt(least);
    }
  }
  return found;
}

// BT.601 luma on white, in OpenCV's 15-bit fixed point.
function grey(rgba) {
  const { data, width, height } = onGround(rgba, WHITE);
  const made = image(width, height, 1);
  for (let i = 0, j = 0; j < made.data.length; i += 3, j++) made.data[j] = (data[i] * 9798 + data[i + 1] * 19235 + data[i + 2] * 3735 + (1 << 14)) >> 15;
  return made;
}

const mirrored = (i, length) => {
  if (length === 1) return 0;
  const period = 2 * (length - 1);
  const at = ((i % period) + period) % period;
  return at < length ? at : period - at;
};

// Gaussian of radius ⌈3σ⌉, mirrored at the border without repeating it.
function blur(values, width, height, sigma) {
  const radius = Math.ceil(3 * sigma);
  const raw = Array.from({ length: 2 * radius + 1 }, (_, i) => Math.exp(-((i - radius) ** 2) / (2 * sigma ** 2)));
  const total = raw.reduce((sum, v) => sum + v, 0);
  const weights = raw.map((v) => f32(v / total));
  for (const [step, length, others, stride] of [[width, height, width, 1], [1, width, height, width]]) {
    const made = new Float32Array(values.length);
    for (let other = 0; other < others; other++) {
      for (let i = 0; i < length; i++) {
        let sum = 0;
        for (let k = 0; k < weights.length; k++) sum = f32(sum + f32(weights[k] * values[other * stride + mirrored(i + k - radius, length) * step]));
        made[other * stride + i * step] = sum;
      }
    }
    values = made;
  }
  return values;
}

// 3×3 Sobel over 8, to the right and down.
function gradient(values, width, height) {
  const [gx, gy] = [new Float32Array(values.length), new Float32Array(values.length)];
  const at = (x, y) => values[mirrored(y, height) * width + mirrored(x, width)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const across = (v) => f32(at(x + 1, v) - at(x - 1, v));
      const down = (u) => f32(at(u, y + 1) - at(u, y - 1));
      gx[y * width + x] = f32(f32(across(y - 1) + 2 * across(y)) + across(y + 1)) / 8;
      gy[y * width + x] = f32(f32(down(x - 1) + 2 * down(x)) + down(x + 1)) / 8;
    }
  }
  return [gx, gy];
}

// 0…1 → 0…255; halves go to the even neighbour.
function level(x) {
  const scaled = f32(Math.min(1, Math.max(0, x)) * 255);
  const low = Math.floor(scaled);
  return scaled - low === 0.5 ? low + (low % 2) : Math.round(scaled);
}

const toGrey = (values, width, height) => image(width, height, 1, Uint8Array.from(values, level));

function repeated(map) {
  const made = image(map.width, map.height, 3);
  for (let i = 0; i < map.data.length; i++) made.data.fill(map.data[i], 3 * i, 3 * i + 3);
  return made;
}
