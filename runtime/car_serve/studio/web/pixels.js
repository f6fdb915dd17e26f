// Images as {width, height, channels, data: Uint8Array}, and what Pillow does to them, to the bit: resizing, compositing,
// grey. RGB has 3 channels, RGBA 4, not premultiplied; grey has 1.

const BITS = 22; // of Pillow's fixed-point coefficients

export const FILTERS = { bicubic: [bicubic, 2], lanczos: [lanczos, 3] };
const BLACK = [0, 0, 0];
export const WHITE = [255, 255, 255];

export function image(width, height, channels, data = new Uint8Array(width * height * channels)) {
  return { width, height, channels, data };
}

// Image.resize of Pillow. filter: "bicubic" or "lanczos".
export function resize(source, width, height, filter) {
  if (source.width === width && source.height === height) return source;
  const flat = source.channels === 4 ? premultiplied(source) : source;
  const across = source.width === width ? flat : horizontal(flat, width, FILTERS[filter]);
  const down = source.height === height ? across : vertical(across, height, FILTERS[filter]);
  return source.channels === 4 ? unpremultiplied(down) : down;
}

export function crop(source, left, top, width, height) {
  const made = image(width, height, source.channels);
  const length = width * source.channels;
  for (let y = 0; y < height; y++) {
    const at = ((top + y) * source.width + left) * source.channels;
    made.data.set(source.data.subarray(at, at + length), y * length);
  }
  return made;
}

// Python's round: halves go to the even neighbour.
export function round(x) {
  const low = Math.floor(x);
  const rest = x - low;
  if (rest !== 0.5) return Math.round(x);
  return low % 2 === 0 ? low : low + 1;
}

// A square of `size` pixels: the middle ("crop"), all of it with margins ("pad"), or distorted ("stretch").
export function fitted(source, size, fit, margin) {
  const { width, height, channels } = source;
  if (width === size && height === size) return source;
  if (fit === "pad") {
    const longer = Math.max(width, height);
    const [w, h] = [width, height].map((side) => Math.max(1, round((side * size) / longer)));
    const inner = resize(source, w, h, "lanczos");
    const square = filled(size, size, [...margin, 0].slice(0, channels));
    paste(square, inner, (size - w) >> 1, (size - h) >> 1);
    return square;
  }
  if (fit === "crop") {
    const edge = Math.min(width, height);
    source = crop(source, (width - edge) >> 1, (height - edge) >> 1, edge, edge);
  }
  return resize(source, size, size, "lanczos");
}

export function filled(width, height, colour) {
  const made = image(width, height, colour.length);
  for (let i = 0; i < made.data.length; i++) made.data[i] = colour[i % colour.length];
  return made;
}

export function paste(target, source, left, top) {
  for (let y = 0; y < source.height; y++) {
    target.data.set(source.data.subarray(y * source.width * source.channels, (y + 1) * source.width * source.channels), ((top + y) * target.width + left) * target.channels);
  }
}

// RGB, with the ground where it is transparent.
export function onGround(source, ground = BLACK) {
  if (source.channels === 3) return source;
  const made = image(source.width, source.height, 3);
  for (let i = 0, j = 0; i < source.data.length; i += 4, j += 3) {
    const alpha = source.data[i + 3];
    for (let c = 0; c < 3; c++) {
      const scaled = source.data[i + c] * alpha + ground[c] * (255 - alpha) + 128;
      made.data[j + c] = (scaled + (scaled >> 8)) >> 8;
    }
  }
  return made;
}

// Pillow's convert("L") of RGB.
export function luma(rgb) {
  const made = image(rgb.width, rgb.height, 1);
  for (let i = 0, j = 0; j < made.data.length; i += 3, j++) {
    made.data[j] = (rgb.data[i] * 19595 + rgb.data[i + 1] * 38470 + rgb.data[i + 2] * 7471 + 0x8000) >> 16;
  }
  return made;
}

export function opaque(source) {
  if (source.channels !== 4) return true;
  for (let i = 3; i < source.data.length; i += 4) if (source.data[i] !== 255) return false;
  return true;
}

function horizontal(source, width, filter) {
  const { channels, height } = source;
  const made = image(width, height, channels);
  const taps = coefficients(source.width, width, filter);
  for (let y = 0; y < height; y++) {
    const row = y * source.width * channels;
    for (let x = 0; x < width; x++) {
      const [first, weights] = taps[x];
      for (let c = 0; c < channels; c++) {
        let sum = 1 << (BITS - 1);
        for (let i = 0, at = row + first * channels + c; i < weights.length; i++, at += channels) sum += source.data[at] * weights[i];
        made.data[(y * width + x) * channels + c] = clipped(sum);
      }
    }
  }
  return made;
}

function vertical(source, height, filter) {
  const made = image(source.width, height, source.channels);
  const taps = coefficients(source.height, height, filter);
  const row = source.width * source.channels;
  for (let y = 0; y < height; y++) {
    const [first, weights] = taps[y];
    for (let x = 0; x < row; x++) {
      let sum = 1 << (BITS - 1);
      for (let i = 0, at = first * row + x; i < weights.length; i++, at += row) sum += source.data[at] * weights[i];
      made.data[y * row + x] = clipped(sum);
    }
  }
  return made;
}

const clipped = (sum) => Math.min(255, Math.max(0, sum >> BITS));

// For each place of the output the first pixel that it is made of, and the weights.
function coefficients(from, to, [filter, reach]) {
  const scale = from / to;
  const wide = Math.max(1, scale);
  const support = reach * wide;
  const per = 1 / wide;
  return Array.from({ length: to }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const last = Math.min(from, Math.trunc(centre + support + 0.5));
    const values = [];
    let total = 0;
    for (let x = first; x < last; x++) {
      const weight = filter((x - centre + 0.5) * per);
      values.push(weight);
      total += weight;
    }
    return [first, Int32Array.from(values, (value) => {
      const share = total === 0 ? value : value / total;
      return Math.trunc((share < 0 ? -0.5 : 0.5) + share * (1 << BITS));
    })];
  });
}

function bicubic(x) {
  const a = -0.5;
  x = Math.abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

const sinc = (x) => (x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI));
function lanczos(x) { return x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0; }

function premultiplied(source) {
  const made = image(source.width, source.height, 4);
  for (let i = 0; i < source.data.length; i += 4) {
    const alpha = source.data[i + 3];
    for (let c = 0; c < 3; c++) {
      const product = source.data[i + c] * alpha + 128;
      made.data[i + c] = ((product >> 8) + product) >> 8;
    }
    made.data[i + 3] = alpha;
  }
  return made;
}

function unpremultiplied(source) {
  const made = image(source.width, source.height, 4, source.data.slice());
  for (let i = 0; i < made.data.length; i += 4) {
    const alpha = made.data[i + 3];
    if (alpha === 0 || alpha === 255) continue;
    for (let c = 0; c < 3; c++) made.data[i + c] = Math.min(255, Math.trunc((255 * made.data[i + c]) / alpha));
  }
  return made;
}
