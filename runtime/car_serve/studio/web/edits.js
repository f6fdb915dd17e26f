// Edits of an image, as car_runtime.editing does them: which tokens are kept, and how what was drawn goes back into the image.
//
// H, W: pixels of the frame; N: pixels of the model's square.

import { textOf } from "../png.js";
import { picture, Refused, toBytes } from "./codec.js";
import { fitted, filled, image, luma, onGround, paste, resize, round, WHITE } from "./pixels.js";
import { imageDigest, readReceipt } from "./receipt.js";

const MASK_LEVEL = 128; // grey level from which on a mask says "draw anew"
const FEATHER = 0.02; // width of the seam, as a share of the square's side
const CONTEXT = 4; // the square is that many times as wide as what is drawn anew, where there is room
const REACH = 1 / 16; // of the square: over how much a difference in colour is smoothed
const TONE = 24; // grey levels: what differs by more is another shape
const DOUBT = 0.3; // weight of no difference at a place whose own says nothing
const PLAIN = 16; // grey levels of deviation from which on an area is not plain
const MAX_SIDE = 8192;

// An edit of a form, checked: {known, mask, whole, frame, facts, about}. edit: {id, index} or {image}, with scale, mask or frame.
export async function opened(plan, edit, results) {
  const ways = ["scale", "mask", "frame"].filter((name) => edit[name] !== undefined && edit[name] !== null);
  if (ways.length !== 1) throw new Refused("edit is unclear; give exactly one of scale, mask and frame");
  if ((edit.id === undefined) === (edit.image === undefined)) throw new Refused("edit has no source; give exactly one of id and image");
  const earlier = edit.id === undefined ? null : results.get(edit.id);
  if (earlier === undefined) throw new Refused(`there is no result '${edit.id}', or no longer; draw it again`, { status: 404, code: "not_found" });
  const index = edit.index ?? 0;
  const { id: _, image: __, mask: ___, index: ____, rule, ...about } = edit;
  if (index) about.index = index;
  if (rule !== undefined && rule !== "published") about.rule = rule;
  if (edit.scale !== undefined) return { about, ...(await branched(plan, edit, earlier, index)) };
  const photo = earlier ? earlier.images[index] : await picture(edit.image, "edit.image");
  if (!photo) throw new Refused("the result has no finished image; edit one that was drawn to the end");
  const frame = edit.frame ? extendedFrame(plan, photo, edit.frame, about) : await maskedFrame(plan, photo, edit.mask);
  const mask = knownMask(frame.repaintView(), plan.scales, rule ?? "published");
  if (knownMask(frame.repaintView(0), plan.scales, rule ?? "published").every(Boolean)) {
    throw new Refused(`what is to be drawn anew covers no token by half, which are ${Number((frame.square.side / plan.scales.at(-1).side).toPrecision(3))} pixels wide here, so that all would be kept; give a larger part`);
  }
  const tokens = await plan.encode(frame.view(plan.model.image_size));
  const { left, top, side } = frame.square;
  const facts = { edit: "part", edit_from_scale: 0, edit_rule: rule ?? "published", edit_harmonise: 0, edit_feather: null, edit_square: `${left},${top},${side}` };
  return { about, mask, known: tokens.map((token, i) => (mask[i] ? token : 0)), whole: false, frame, facts };
}

// Tokens that are kept are exact where they are known, of an earlier result or from a PNG's receipt; else the encoder's.
async function branched(plan, edit, earlier, index) {
  const last = plan.scales.length - 1;
  const { scale } = edit;
  if (!Number.isInteger(scale) || scale < 0 || scale > last) throw new Refused(`edit.scale is ${scale}; give 0…${last}, the last scale to keep`);
  let [tokens, part] = [null, false];
  if (earlier) {
    tokens = earlier.tokens[index];
    part = earlier.part;
    if (tokens.subarray(0, plan.scales[scale].stop).some((token) => token < 0)) throw new Refused("the result was not drawn as far as that; choose a coarser scale");
  } else {
    const found = await readReceipt(await textOf(new Blob([toBytes(edit.image)])), plan.about).catch(() => null);
    if (found && found.image === (await imageDigest(onGround(await picture(edit.image, "edit.image"), WHITE)))) [tokens, part] = [found.tokens, found.settings.edit === "part"];
  }
  if (!tokens || (part && scale < last)) {
    const photo = onGround(earlier ? earlier.images[index] : await picture(edit.image, "edit.image"), WHITE);
    tokens = await plan.encode(fitted(photo, plan.model.image_size, "crop", WHITE));
  }
  const mask = Uint8Array.from(tokens, (token, i) => (i < plan.scales[scale].stop && token >= 0 ? 1 : 0));
  return { mask, known: tokens.map((token, i) => (mask[i] ? token : 0)), whole: true, frame: null, facts: { edit: "whole", edit_from_scale: scale + 1 } };
}

async function maskedFrame(plan, photo, mask) {
  const given = luma(onGround(await picture(mask, "edit.mask")));
  const { width, height } = photo;
  const repaint = new Uint8Array(width * height);
  for (let y = 0; y < height; y++) {
    const row = Math.floor(((y + 0.5) * given.height) / height) * given.width;
    for (let x = 0; x < width; x++) repaint[y * width + x] = given.data[row + Math.floor(((x + 0.5) * given.width) / width)] >= MASK_LEVEL ? 1 : 0;
  }
  if (!repaint.includes(1)) throw new Refused("the mask marks nothing; paint what is to be drawn anew");
  return new Frame(photo, repaint, squareAround(repaint, width, height, plan.model.image_size));
}

// The photo in a larger frame, mirrored at its edges. given: left, top, right, bottom in 0…1 of the new square.
function extendedFrame(plan, photo, given, about) {
  const [left, top, right, bottom] = given;
  if (!(left < right && top < bottom)) throw new Refused(`edit.frame is ${JSON.stringify(given)}; give left < right and top < bottom in 0…1`);
  const side = photo.width / (right - left);
  if (Math.abs(photo.height - side * (bottom - top)) > 0.02 * photo.height + 1) throw new Refused(`edit.frame ${JSON.stringify(given)} has not the image's shape; keep its width ÷ height`);
  const [before, above] = [round(left * side), round(top * side)];
  const [after, below] = [[before, photo.width], [above, photo.height]].map(([start, own]) => Math.max(0, round(side) - start - own));
  const margins = [before, above, after, below];
  if (!margins.some(Boolean)) throw new Refused("edit.frame covers the whole square; leave room to draw in");
  margins.forEach((margin, i) => {
    const own = i % 2 ? photo.height : photo.width;
    if (margin > own) throw new Refused(`the image is to be extended by ${margin} pixels, but at most by its own ${own}; extend twice for more`);
  });
  const [width, height] = [photo.width + before + after, photo.height + above + below];
  if (Math.max(width, height) > MAX_SIDE) throw new Refused(`the extended image is ${width}×${height} pixels, over ${MAX_SIDE} on an edge; extend it by less, or make it smaller first`);
  const whole = image(width, height, photo.channels);
  const repaint = new Uint8Array(width * height).fill(1);
  const folded = (at, length) => { const turn = ((at % (2 * length)) + 2 * length) % (2 * length); return Math.min(turn, 2 * length - 1 - turn); };
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const from = (folded(y - above, photo.height) * photo.width + folded(x - before, photo.width)) * photo.channels;
      whole.data.set(photo.data.subarray(from, from + photo.channels), (y * width + x) * photo.channels);
      if (x >= before && x < before + photo.width && y >= above && y < above + photo.height) repaint[y * width + x] = 0;
    }
  }
  about.extend = margins;
  const place = [before, above, before + photo.width, above + photo.height];
  return new Frame(whole, repaint, squareAround(repaint, width, height, plan.model.image_size), place);
}

// A photo with the pixels that are to be drawn anew, and the square of it that the model sees.
export class Frame {
  // repaint: 1 where the model draws, [H·W]. square: {left, top, side}. photo: where an extended one is in the frame.
  constructor(whole, repaint, square, photo = null) {
    Object.assign(this, { whole, repaint, square, photo });
  }

  // The square as RGB of `size` pixels, transparent parts white.
  view(size) {
    return resize(this.#cut(onGround(this.whole, WHITE)), size, size, "lanczos");
  }

  // The square of another image of this frame, such as its control; one of the photo's shape is that of the photo.
  cutAlike(other, ground) {
    const { width, height } = this.whole;
    if (this.photo && likeness(other, { width, height }) > 1.01) {
      const [left, top, right, bottom] = this.photo;
      if (likeness(other, { width: right - left, height: bottom - top }) < likeness(other, { width, height })) {
        const whole = filled(width, height, ground);
        paste(whole, resize(onGround(other, ground), right - left, bottom - top, "lanczos"), left, top);
        return this.#cut(whole);
      }
    }
    return this.#cut(resize(other, width, height, "lanczos"));
  }

  // [side·side]: what is drawn anew of the square; beyond the frame it is `beyond`.
  repaintView(beyond = 1) {
    const { left, top, side } = this.square;
    const { width, height } = this.whole;
    const made = new Uint8Array(side * side);
    for (let y = 0; y < side; y++) {
      for (let x = 0; x < side; x++) {
        const [u, v] = [left + x, top + y];
        made[y * side + x] = u < 0 || v < 0 || u >= width || v >= height ? beyond : this.repaint[v * width + u];
      }
    }
    return made;
  }

  // The frame with a drawn square put back in the photo's tones; beyond the seam every pixel is the photo's own.
  finished(drawn) {
    return this.#paste(this.#matched(drawn));
  }

  #cut(source) {
    const { left, top, side } = this.square;
    const made = image(side, side, source.channels);
    for (let y = 0; y < side; y++) {
      const v = Math.min(source.height - 1, Math.max(0, top + y));
      for (let x = 0; x < side; x++) {
        const u = Math.min(source.width - 1, Math.max(0, left + x));
        for (let c = 0; c < source.channels; c++) made.data[(y * side + x) * source.channels + c] = source.data[(v * source.width + u) * source.channels + c];
      }
    }
    return made;
  }

  #paste(drawn) {
    const { left, top, side } = this.square;
    const { width, height, channels } = this.whole;
    const big = resize(drawn, side, side, "lanczos");
    const alpha = softened(Float64Array.from(this.repaint), width, height, round(FEATHER * side));
    const made = { ...this.whole, data: this.whole.data.slice() };
    for (let v = Math.max(0, top); v < Math.min(top + side, height); v++) {
      for (let u = Math.max(0, left); u < Math.min(left + side, width); u++) {
        const share = alpha[v * width + u];
        if (!(share > 0)) continue;
        const at = (v * width + u) * channels;
        const cover = channels === 4 ? share + ((1 - share) * made.data[at + 3]) / 255 : 1;
        const colour = channels === 4 ? share / Math.max(cover, 1e-9) : share;
        for (let c = 0; c < 3; c++) made.data[at + c] = round(colour * big.data[((v - top) * side + u - left) * 3 + c] + (1 - colour) * made.data[at + c]);
        if (channels === 4) made.data[at + 3] = round(share * 255 + (1 - share) * made.data[at + 3]);
      }
    }
    return made;
  }

  // Without the tokenizer's error in colour and, where photo and drawing are both plain, without a step at their border.
  #matched(drawn) {
    const N = drawn.width;
    const photo = Float64Array.from(this.view(N).data);
    const anew = nearest(this.repaintView(), this.square.side, N);
    const kept = anew.map((value) => 1 - value);
    const width = Math.max(1, round(REACH * N));
    const around = softened(anew, N, N, 2 * width);
    const ring = anew.map((value, i) => (!value && around[i] > 0 ? 1 : 0));
    if (!ring.includes(1)) return drawn;
    const values = Float64Array.from(drawn.data);
    const error = photo.map((value, i) => value - values[i]);
    const tone = spread(error, ring.map((value, i) => value * trust(error, i, TONE)), ring, N, width);
    tone.forEach((value, i) => { values[i] += value; });
    const narrow = Math.max(1, Math.floor(width / 2));
    const [near, beyond] = [softened(anew, N, N, narrow), softened(kept, N, N, narrow)];
    const outside = ring.map((value, i) => (value && near[i] > 0 ? 1 : 0));
    const inside = anew.map((value, i) => (value && beyond[i] > 0 ? 1 : 0));
    const [old, fresh] = [meanNear(photo, outside, N, narrow), meanNear(values, inside, N, narrow)];
    const left = old.mean.map((value, i) => value - fresh.mean[i]);
    const smooth = inside.map((value, i) => value / (1 + ((old.rough[i] + fresh.rough[i]) / PLAIN) ** 4));
    const most = [0, 1, 2].map((c) => median(left.filter((_, i) => i % 3 === c && smooth[Math.floor(i / 3)] > 0.5)));
    const apart = left.map((value, i) => value - most[i % 3]);
    const weight = Number.isNaN(most[0]) ? smooth : smooth.map((value, i) => value * trust(apart, i, 2 * TONE));
    const sum = (list) => list.reduce((total, value) => total + value, 0);
    const plain = Math.min(1, (2 * sum(smooth)) / Math.max(sum(inside), 1));
    const fade = softened(kept, N, N, Math.floor(N / 2));
    const step = spread(left, weight, inside, N, width);
    step.forEach((value, i) => { values[i] += plain * fade[Math.floor(i / 3)] * anew[Math.floor(i / 3)] * value; });
    // Of the drawing's colour, which runs a little over the border.
    const over = meanNear(photo.map((value, i) => value - values[i]), ring, N, 1).mean;
    const part = ring.map((value, i) => value * trust(over, i, 2 * TONE));
    return { ...drawn, data: Uint8Array.from(values, (value, i) => round(Math.min(255, Math.max(0, value + part[Math.floor(i / 3)] * over[i])))) };
  }
}

// ---- masks of pixels as masks of tokens ----------------------------------------------------------------------------

// [L], 1 where a token is kept. repaint: [side·side]. rule: "published", that of VAR's zero-shot editing, or "strict".
export function knownMask(repaint, scales, rule) {
  if (rule !== "published" && rule !== "strict") throw new Refused(`there is no mask rule '${rule}'; choose published or strict`);
  const side = Math.sqrt(repaint.length);
  const kept = (cells) => Float64Array.from(cover(repaint, side, cells), (share) => (share < 0.5 ? 1 : 0));
  const finest = kept(scales.at(-1).side);
  return Uint8Array.from(scales.flatMap((scale) => {
    if (rule === "strict") return [...kept(scale.side)];
    if (scale.side === 1) return [1];
    return Array.from(bilinear(finest, scales.at(-1).side, scale.side), (value) => (value > 0.5 ? 1 : 0));
  }));
}

// A mask at another side, bilinear, to the bit what PyTorch's interpolate gives.
function bilinear(mask, N, side) {
  const f = Math.fround;
  const ratio = f(f(N) / f(side));
  const at = Float32Array.from({ length: side }, (_, i) => Math.max(ratio * (i + 0.5) - 0.5, 0));
  const low = Array.from(at, (value) => Math.min(Math.trunc(value), N - 1));
  const high = low.map((value) => Math.min(value + 1, N - 1));
  const far = Float32Array.from(at, (value, i) => f(value - low[i]));
  const near = far.map((value) => f(1 - value));
  const made = new Float32Array(side * side);
  for (const [rows, down] of [[low, near], [high, far]]) {
    for (const [columns, across] of [[low, near], [high, far]]) {
      for (let y = 0; y < side; y++) for (let x = 0; x < side; x++) made[y * side + x] = f(made[y * side + x] + f(f(down[y] * across[x]) * mask[rows[y] * N + columns[x]]));
    }
  }
  return made;
}

// The share of each of cells × cells that the mask covers.
function cover(mask, side, cells) {
  const shares = Array.from({ length: cells }, (_, cell) => {
    const [from, to] = [cell * (side / cells), (cell + 1) * (side / cells)];
    const found = [];
    for (let p = Math.floor(from); p < Math.min(side, Math.ceil(to)); p++) {
      const share = Math.max(0, Math.min(to, p + 1) - Math.max(from, p)) * (cells / side);
      if (share > 0) found.push([p, share]);
    }
    return found;
  });
  const made = new Float64Array(cells * cells);
  for (let y = 0; y < cells; y++) for (let x = 0; x < cells; x++) for (const [v, down] of shares[y]) for (const [u, across] of shares[x]) made[y * cells + x] += down * across * mask[v * side + u];
  return made;
}

// ---- mathematics ---------------------------------------------------------------------------------------------------

// The square that the model sees, around what is drawn anew.
function squareAround(repaint, W, H, size) {
  let [x0, y0, x1, y1] = [W, H, 0, 0];
  repaint.forEach((value, i) => {
    if (!value) return;
    const [x, y] = [i % W, Math.floor(i / W)];
    [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x + 1), Math.max(y1, y + 1)];
  });
  const longer = Math.max(x1 - x0, y1 - y0);
  const side = Math.max(Math.min(Math.max(CONTEXT * longer, size), H, W), longer);
  const placed = (centre, length) => (side > length ? Math.floor((length - side) / 2) : Math.min(Math.max(round(centre - side / 2), 0), length - side));
  return { left: placed((x0 + x1) / 2, W), top: placed((y0 + y1) / 2, H), side };
}

const likeness = (one, other) => {
  const ratio = (one.width * other.height) / (one.height * other.width);
  return Math.max(ratio, 1 / ratio);
};

function nearest(mask, side, N) {
  return Float64Array.from({ length: N * N }, (_, i) => mask[Math.floor(((Math.floor(i / N) + 0.5) * side) / N) * side + Math.floor((((i % N) + 0.5) * side) / N)]);
}

// 1 where the mask is, falling to 0 over `width` pixels around it.
function softened(mask, W, H, width) {
  const reach = Math.floor(width / 2);
  let values = Float64Array.from(mask);
  for (const axis of [0, 1]) values = windowMean(values, W, H, 1, width - reach, axis).map((value) => (value > 0 ? 1 : 0));
  for (const axis of [0, 1]) values = windowMean(values, W, H, 1, reach, axis);
  return values;
}

// Mean of the 2·reach + 1 neighbours along an axis (0: down), of values [H·W·channels]; the edge goes on beyond.
function windowMean(values, W, H, channels, reach, axis) {
  const [length, others, step, stride] = axis === 0 ? [H, W, W * channels, channels] : [W, H, channels, W * channels];
  const made = new Float64Array(values.length);
  const total = new Float64Array(length + 2 * reach + 2);
  for (let other = 0; other < others; other++) {
    for (let c = 0; c < channels; c++) {
      const at = other * stride + c;
      for (let i = 0; i < total.length; i++) total[i] = (i ? total[i - 1] : 0) + values[at + Math.min(length - 1, Math.max(0, i - reach - 1)) * step];
      for (let i = 0; i < length; i++) made[at + i * step] = (total[i + 2 * reach + 1] - total[i]) / (2 * reach + 1);
    }
  }
  return made;
}

function blurred(values, N, channels, width) {
  for (const axis of [0, 1, 0, 1]) values = windowMean(values, N, N, channels, width, axis);
  return values;
}

function median(values) {
  const sorted = Float64Array.from(values).sort();
  return (sorted[(sorted.length - 1) >> 1] + sorted[sorted.length >> 1]) / 2;
}

// 1 where a pixel's colours differ by little, near 0 where by more than `level` grey levels.
function trust(difference, i, level) {
  return 1 / (1 + (Math.max(...[0, 1, 2].map((c) => Math.abs(difference[3 * i + c]))) / level) ** 4);
}

// The weighted mean of the values around each place, [N·N·3]: of far ones where there are no near ones. among: where
// values can be from; what their weight lacks of 1 counts as zeros, by DOUBT.
function spread(values, weight, among, N, width) {
  const both = new Float64Array(4 * N * N);
  weight.forEach((share, i) => both.set([values[3 * i] * share, values[3 * i + 1] * share, values[3 * i + 2] * share, share + DOUBT * (among[i] - share)], 4 * i));
  const total = new Float64Array(both.length);
  for (let reach = width, share = 1; ; reach *= 2, share /= 8) {
    blurred(both, N, 4, reach).forEach((value, i) => { total[i] += share * value; });
    if (reach >= N) return Float64Array.from({ length: 3 * N * N }, (_, i) => total[4 * Math.floor(i / 3) + (i % 3)] / Math.max(total[4 * Math.floor(i / 3) + 3], 1e-12));
  }
}

// Around each pixel the mean of the values where the mask is, and their deviation.
function meanNear(values, where, N, width) {
  const count = blurred(Float64Array.from(where), N, 1, width);
  const of = (power) => blurred(values.map((value, i) => where[Math.floor(i / 3)] * value ** power), N, 3, width).map((value, i) => value / (count[Math.floor(i / 3)] + 1e-9));
  const [mean, square] = [of(1), of(2)];
  const rough = Float64Array.from({ length: N * N }, (_, i) => Math.sqrt([0, 1, 2].reduce((sum, c) => sum + Math.max(square[3 * i + c] - mean[3 * i + c] ** 2, 0), 0) / 3));
  return { mean, rough };
}
