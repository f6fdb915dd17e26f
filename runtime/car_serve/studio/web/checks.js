// A control map brought to the model's square, and what about it is probably not as meant: car_runtime.control_checks.

import { filled, fitted, image, luma, onGround, round } from "./pixels.js";

const CONTRAST = 8; // grey levels from which on two are distinguished
const [COLOURED, COLOURED_SHARE] = [40, 0.05];
const LINE = 96; // grey levels from the ground that a line has to be to be followed
const MIDDLE = [64, 176]; // median of a map of lines: below it is one, above it is inverted, within it is a photo
const FEW = 1 / 1024;
const UNUSED = 64; // a depth map that spans fewer levels is nearly flat
const LOST = 0.4; // share of their contrast that lines must keep when a map is made smaller
const CROPPED = 1.5;

// {square: RGB, warnings}
export function prepareControl(given, convention, size, fit) {
  const ground = convention?.ground ?? [0, 0, 0];
  const [flat, redrawn] = drawnOnGround(given, ground);
  const how = fit ?? convention?.fit ?? "crop";
  const square = fitted(flat, size, how, ground);
  const warnings = [];
  if (redrawn) {
    warnings.push(`the control's strokes have the colour that its transparent parts get here (${name(ground)}), and were drawn in ${name(ground.map((v) => 255 - v))}; save it with opaque ground to choose`);
  }
  const aspect = aspectWarning("control", given, size, how);
  if (aspect) warnings.push(aspect);
  const lines = ["light-on-dark", "dark-on-light"].includes(convention?.polarity);
  let found = content(square, convention);
  if (found === null && lines) found = thinLines(flat, square, convention.control_type) ?? fewLines(square);
  if (found !== null) warnings.push(found);
  return { square, warnings };
}

export function photoWarning(photo, size, fit) {
  return aspectWarning("photo", photo, size, fit, fit === "stretch" ? 1 : CROPPED);
}

function aspectWarning(what, { width, height }, size, fit, least = 1) {
  const [long, short] = [Math.max(width, height), Math.min(width, height)];
  if (long / short <= least || ((long - short) * size) / long < 1) return null;
  const done = { crop: "its middle was taken", pad: "margins were added", stretch: "it was distorted" }[fit];
  return `the ${what} is ${width}×${height}, not square, and ${done}; give a square one`;
}

// Black strokes on transparency say all that they say in the alpha channel.
function drawnOnGround(given, ground) {
  const flat = onGround(given, ground);
  if (given.channels !== 4 || spread(flat) >= CONTRAST) return [flat, false];
  const alpha = image(given.width, given.height, 1);
  for (let i = 0; i < alpha.data.length; i++) alpha.data[i] = given.data[4 * i + 3];
  if (spread(alpha) < CONTRAST) return [flat, false];
  const made = filled(given.width, given.height, ground);
  for (let i = 0; i < alpha.data.length; i++) {
    for (let c = 0; c < 3; c++) {
      const mixed = (255 - ground[c]) * alpha.data[i] + ground[c] * (255 - alpha.data[i]) + 128;
      made.data[3 * i + c] = (mixed + (mixed >> 8)) >> 8;
    }
  }
  return [made, true];
}

// Of all channels the largest difference between two pixels.
function spread({ data, channels }) {
  let most = 0;
  for (let c = 0; c < channels; c++) {
    let [low, high] = [255, 0];
    for (let i = c; i < data.length; i += channels) { low = Math.min(low, data[i]); high = Math.max(high, data[i]); }
    most = Math.max(most, high - low);
  }
  return most;
}

function content(rgb, convention) {
  const kind = convention?.control_type ?? "control";
  const wide = spread(rgb);
  if (wide < CONTRAST && !(wide && kind === "depth")) return `the control is blank: all of it is ${name(rgb.data)}; there is nothing to follow`;
  if (!convention) return null;
  if (convention.polarity === "vectors") return normals(rgb, convention);
  const count = rgb.data.length / 3;
  let coloured = 0;
  const grey = new Float64Array(count);
  for (let i = 0; i < count; i++) {
    const [r, g, b] = rgb.data.subarray(3 * i, 3 * i + 3);
    if (Math.max(r, g, b) - Math.min(r, g, b) > COLOURED) coloured++;
    grey[i] = (r + g + b) / 3;
  }
  if (coloured / count > COLOURED_SHARE) return `the control is coloured (${Math.round((100 * coloured) / count)}% of it), but ${kind} maps are grey; bring a photo as a photo, and save depth without a colour map`;
  const turned = ["dark-on-light", "far-is-light"].includes(convention.polarity) ? grey.map((v) => 255 - v) : grey;
  return convention.polarity.includes("light-on-dark") || convention.polarity === "dark-on-light" ? linesWrong(turned, convention) : depthWrong(turned, rgb.width, kind);
}

function linesWrong(grey, convention) {
  const middle = median(grey);
  const here = convention.polarity.replaceAll("-", " ");
  if (middle > MIDDLE[1]) return `the control looks inverted: ${convention.control_type} maps of this plan are ${here}; invert it`;
  if (middle > MIDDLE[0]) return `the control looks like a photo, not like lines that are ${here} (${convention.control_type}); give it as a photo`;
  return null;
}

function fewLines(rgb) {
  const grey = Float64Array.from({ length: rgb.data.length / 3 }, (_, i) => (rgb.data[3 * i] + rgb.data[3 * i + 1] + rgb.data[3 * i + 2]) / 3);
  const middle = median(grey);
  const off = grey.filter((v) => Math.abs(v - middle) > LINE).length;
  return off >= FEW * grey.length ? null : `the control is nearly blank: ${off} of ${grey.length} pixels are on lines; draw more, or stronger lines`;
}

function depthWrong(near, side, kind) {
  const [low, high] = [percentile(near, 0.5), percentile(near, 99.5)];
  if (high - low < UNUSED) return `the control uses grey levels ${low.toFixed(0)}…${high.toFixed(0)} of 0…255 alone, so its ${kind} is nearly flat; stretch it to the whole range before it is saved`;
  const edge = Math.max(1, Math.floor(side / 16));
  const isBorder = (i) => { const [x, y] = [i % side, Math.floor(i / side)]; return Math.min(x, y) < edge || Math.max(x, y) >= side - edge; };
  const border = near.filter((_, i) => isBorder(i));
  const inner = near.filter((_, i) => !isBorder(i));
  if (percentile(border, 20) >= 240 && percentile(inner, 5) < 160) return `the control looks inverted: its border is nearer than what it surrounds (${kind}); invert it`;
  return null;
}

function normals(rgb, convention) {
  const kind = convention.control_type;
  const [lengths, z] = [[], []];
  let empty = 0;
  let ground = null;
  for (let i = 0; i < rgb.data.length; i += 3) {
    const p = rgb.data.subarray(i, i + 3);
    if (Math.max(...p) < 16 || Math.min(...p) > 239) { empty++; ground ??= p; continue; }
    const n = [...p].map((v) => v / 127.5 - 1);
    lengths.push(Math.hypot(...n));
    z.push(n[2]);
  }
  const count = rgb.data.length / 3;
  const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
  const unit = lengths.filter((v) => Math.abs(v - 1) < 0.3).length / lengths.length;
  if (lengths.length / count < 0.02 || unit < 0.6 || mean(z) < 0) return `the control is no ${kind} map: its colours are not unit vectors to the viewer`;
  if (empty / count > 0.05) return `the control's ground is ${name(ground)}, which is no direction; make it ${name(convention.ground)} or transparent`;
  return null;
}

// Lines of a pixel in a large map are grey haze in a small one.
function thinLines(flat, square, kind) {
  const shorter = Math.min(flat.width, flat.height);
  if (shorter < 1.5 * square.width) return null;
  const { width, height } = flat;
  const before = offGround(flat);
  const strokes = before.filter((v) => v > LINE);
  if (!strokes.length) return null;
  let edges = 0; // of lines, whose number of pixels says how wide these are
  for (let y = 1; y < height - 1; y++) {
    for (let x = 1; x < width - 1; x++) {
      const i = y * width + x;
      if (before[i] > LINE && ![i - width, i + width, i - 1, i + 1].every((j) => before[j] > LINE)) edges++;
    }
  }
  const wide = Math.max(1, (2 * strokes.length) / Math.max(edges, 1) - 1);
  const count = Math.max(4, round((strokes.length / wide * square.width) / shorter / 2));
  const kept = offGround(square).sort().slice(-count);
  const mean = (values) => values.reduce((sum, v) => sum + v, 0) / values.length;
  const lost = 1 - mean(kept) / mean(strokes);
  if (lost < 1 - LOST) return null;
  return `the control's lines lose ${Math.round(100 * lost)}% of their contrast from ${flat.width}×${flat.height} to ${square.width}×${square.height} pixels (${kind}); draw them thicker, or at that size`;
}

function offGround(rgb) {
  const grey = Float64Array.from(luma(rgb).data);
  const middle = median(grey);
  return grey.map((v) => Math.abs(v - middle));
}

const median = (values) => percentile(values, 50);

// numpy's, which interpolates.
function percentile(values, share) {
  const sorted = Float64Array.from(values).sort();
  const at = (share / 100) * (sorted.length - 1);
  const low = Math.floor(at);
  return sorted[low] + (at - low) * (sorted[Math.min(low + 1, sorted.length - 1)] - sorted[low]);
}

const name = ([r, g, b]) => ({ "0,0,0": "black", "255,255,255": "white" })[`${r},${g},${b}`] ?? `RGB ${r},${g},${b}`;
