// Image files in and out. Out is PNG, written here, since a canvas may give back other pixels than it was given.

import { image, opaque } from "./pixels.js";

const MAX_PIXELS = 1 << 24;

// What cannot be used; status as the server has it.
export class Refused extends Error {
  constructor(message, { status = 400, code = "bad_request" } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// An image that was given in base64, RGB or RGBA; name: what it is called where it cannot be used.
export async function picture(base64, name) {
  let image;
  try {
    image = await decode(toBytes(base64));
  } catch {
    throw new Refused(`${name} is not an image that can be read; give a PNG, JPEG or WebP file`);
  }
  if (image.width * image.height > MAX_PIXELS) throw new Refused(`${name} is ${image.width}×${image.height}, over ${MAX_PIXELS} pixels; make it smaller first`, { status: 413, code: "too_large" });
  if (Math.min(image.width, image.height) < 8) throw new Refused(`${name} is ${image.width}×${image.height} pixels, under 8 on an edge; give a larger image`);
  return image;
}

export const toBytes = (base64) => Uint8Array.from(atob(base64.slice(base64.startsWith("data:") ? base64.indexOf(",") + 1 : 0)), (c) => c.charCodeAt(0));

export function toBase64(bytes) {
  let text = "";
  for (let i = 0; i < bytes.length; i += 0x8000) text += String.fromCharCode(...bytes.subarray(i, i + 0x8000));
  return btoa(text);
}

// RGB, or RGBA where anything is transparent; upright. PNGs of 8 bits are read here, all else by the browser.
export async function decode(bytes) {
  const read = await readPng(bytes).catch(() => null);
  if (read) return read;
  const bitmap = await createImageBitmap(new Blob([bytes]), { colorSpaceConversion: "none" });
  const canvas = new OffscreenCanvas(bitmap.width, bitmap.height);
  const context = canvas.getContext("2d");
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, bitmap.width, bitmap.height);
  return withoutAlpha(image(bitmap.width, bitmap.height, 4, new Uint8Array(data.buffer)));
}

function withoutAlpha(rgba) {
  if (!opaque(rgba)) return rgba;
  const made = image(rgba.width, rgba.height, 3);
  for (let i = 0, j = 0; i < rgba.data.length; i += 4, j += 3) made.data.set(rgba.data.subarray(i, i + 3), j);
  return made;
}

// RGB → PNG with text chunks.
export async function encodePng({ width, height, data }, texts = {}) {
  const raw = new Uint8Array(height * (3 * width + 1)); // each row after a byte for its filter: none
  for (let y = 0; y < height; y++) raw.set(data.subarray(3 * width * y, 3 * width * (y + 1)), y * (3 * width + 1) + 1);
  const header = new Uint8Array(13);
  new DataView(header.buffer).setUint32(0, width);
  new DataView(header.buffer).setUint32(4, height);
  header.set([8, 2, 0, 0, 0], 8);
  const parts = [Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a), chunk("IHDR", header)];
  for (const [keyword, text] of Object.entries(texts)) {
    const latin = /^[\x00-\xff]*$/.test(text);
    const body = latin ? Uint8Array.from(text, (c) => c.charCodeAt(0)) : new TextEncoder().encode(text);
    const head = Uint8Array.from(`${keyword}\0${latin ? "" : "\0\0\0\0"}`, (c) => c.charCodeAt(0));
    parts.push(chunk(latin ? "tEXt" : "iTXt", joined([head, body])));
  }
  parts.push(chunk("IDAT", await through(raw, new CompressionStream("deflate"))), chunk("IEND", new Uint8Array(0)));
  return joined(parts);
}

// PNG of 8 bits a channel, not interlaced: grey, RGB, either with alpha, or a palette. Null for what it leaves to the browser.
async function readPng(bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (bytes.length < 33 || view.getUint32(0) !== 0x89504e47) return null;
  const [width, height, depth, kind, interlaced] = [view.getUint32(16), view.getUint32(20), bytes[24], bytes[25], bytes[28]];
  const channels = { 0: 1, 2: 3, 3: 1, 4: 2, 6: 4 }[kind];
  if (depth !== 8 || interlaced || !channels || width * height > 1 << 24) return null;
  const parts = [];
  let [palette, clear] = [null, null];
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const body = bytes.subarray(at + 8, at + 8 + length);
    if (type === "eXIf") return null;
    if (type === "IDAT") parts.push(body);
    if (type === "PLTE") palette = body;
    if (type === "tRNS") clear = body;
    at += length + 12;
  }
  if ((clear && kind !== 3) || (kind === 3 && !palette)) return null;
  const rows = unfiltered(await through(joined(parts), new DecompressionStream("deflate")), width, height, channels);
  const rgba = image(width, height, 4);
  for (let i = 0; i < width * height; i++) {
    const p = rows.subarray(i * channels, (i + 1) * channels);
    if (kind === 3) rgba.data.set([...palette.subarray(3 * p[0], 3 * p[0] + 3), clear?.[p[0]] ?? 255], 4 * i);
    else rgba.data.set(channels > 2 ? [p[0], p[1], p[2], p[3] ?? 255] : [p[0], p[0], p[0], p[1] ?? 255], 4 * i);
  }
  return withoutAlpha(rgba);
}

function unfiltered(raw, width, height, channels) {
  const row = width * channels;
  const made = new Uint8Array(row * height);
  for (let y = 0; y < height; y++) {
    const filter = raw[y * (row + 1)];
    for (let x = 0; x < row; x++) {
      const left = x >= channels ? made[y * row + x - channels] : 0;
      const above = y ? made[(y - 1) * row + x] : 0;
      const corner = y && x >= channels ? made[(y - 1) * row + x - channels] : 0;
      made[y * row + x] = raw[y * (row + 1) + 1 + x] + [0, left, above, (left + above) >> 1, paeth(left, above, corner)][filter];
    }
  }
  return made;
}

function paeth(left, above, corner) {
  const guess = left + above - corner;
  const [a, b, c] = [Math.abs(guess - left), Math.abs(guess - above), Math.abs(guess - corner)];
  return a <= b && a <= c ? left : b <= c ? above : corner;
}

async function through(bytes, transform) {
  const stream = new Blob([bytes]).stream().pipeThrough(transform);
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

function chunk(type, body) {
  const made = new Uint8Array(body.length + 12);
  const view = new DataView(made.buffer);
  view.setUint32(0, body.length);
  made.set(Uint8Array.from(type, (c) => c.charCodeAt(0)), 4);
  made.set(body, 8);
  view.setUint32(body.length + 8, crc(made.subarray(4, body.length + 8)));
  return made;
}

function joined(parts) {
  const made = new Uint8Array(parts.reduce((sum, part) => sum + part.length, 0));
  let at = 0;
  for (const part of parts) { made.set(part, at); at += part.length; }
  return made;
}

const TABLE = Uint32Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0xedb88320 ^ (c >>> 1) : c >>> 1;
  return c;
});
const crc = (bytes) => bytes.reduce((c, byte) => TABLE[(c ^ byte) & 0xff] ^ (c >>> 8), 0xffffffff) ^ -1;
