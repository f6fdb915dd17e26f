// Receipts of car_runtime, read and written: JSON in a PNG's text chunk, with a digest of its own as Python writes it.

import { toBase64, toBytes } from "./codec.js";

const KEY = "car-receipt";
const VERSION = 1;
const LONGEST = 64 * 1024;

// The tokens, the digest of the image's own pixels, and what a PNG says of an edit; null where it has no receipt of this plan. Throws an Error for one that was altered.
// texts: {keyword: text}. plan: {digest, tokens, vocab}.
export async function readReceipt(texts, plan) {
  const text = texts[KEY];
  if (text === undefined) return null;
  const altered = new Error("the image's receipt was altered or is damaged; draw from the image itself instead");
  if (text.length > LONGEST) throw altered;
  let outer;
  try { outer = parsed(text); } catch { throw altered; }
  const body = outer?.receipt;
  if (!body || typeof body !== "object" || (await sha256(new TextEncoder().encode(python(body)))) !== outer.sha256) throw altered;
  if (plain(body.version) !== VERSION || body.plan !== plan.digest) return null;
  const settings = Object.fromEntries(Object.entries(body.settings ?? {}).map(([key, value]) => [key, plain(value)]));
  return { settings, image: body.image, tokens: body.tokens ? unpack(body.tokens, plan.tokens, plan.vocab) : null };
}

// The text chunks of an image, RGB. controls: [{branch, weight, image, png}].
export async function writeReceipt(plan, settings, tokens, controls, image) {
  const digests = await Promise.all(controls.map(({ image }) => imageDigest(image)));
  const body = { version: VERSION, plan: plan.digest, name: plan.name, settings, control: digests[0] ?? null, image: await imageDigest(image) };
  const alone = controls.length === 1 && controls[0].branch === plan.defaultBranch && controls[0].weight === 1;
  if (controls.length && !alone) body.branches = controls.map(({ branch, weight }, i) => [branch, weight, digests[i]]);
  body.tokens = pack(tokens, plan.vocab);
  const texts = { [KEY]: python({ receipt: body, sha256: await sha256(new TextEncoder().encode(python(body))) }) };
  controls.forEach(({ branch, png }, i) => { texts[i ? `car-control-${branch}` : "car-control"] = png; });
  return texts;
}

export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function imageDigest({ width, height, data }) {
  const head = new TextEncoder().encode(`(${width}, ${height})`);
  const bytes = new Uint8Array(head.length + data.length);
  bytes.set(head);
  bytes.set(data, head.length);
  return sha256(bytes);
}

// Tokens in as few bits as the vocabulary needs, which itself stands for −1; as base64.
export function pack(tokens, vocab) {
  const bits = vocab.toString(2).length;
  const bytes = new Uint8Array(Math.ceil((tokens.length * bits) / 8));
  tokens.forEach((token, i) => {
    const value = token < 0 ? vocab : token;
    for (let b = 0; b < bits; b++) {
      const at = i * bits + b;
      bytes[at >> 3] |= ((value >> b) & 1) << (7 - (at & 7));
    }
  });
  return toBase64(bytes);
}

export function unpack(text, count, vocab) {
  const bits = vocab.toString(2).length;
  const bytes = toBytes(text);
  if (bytes.length !== Math.ceil((count * bits) / 8)) throw new Error("the image's receipt is damaged; draw from the image itself instead");
  return Int32Array.from({ length: count }, (_, i) => {
    let value = 0;
    for (let b = 0; b < bits; b++) {
      const at = i * bits + b;
      value |= ((bytes[at >> 3] >> (7 - (at & 7))) & 1) << b;
    }
    if (value > vocab) throw new Error("the image's receipt is damaged; draw from the image itself instead");
    return value === vocab ? -1 : value;
  });
}

// ---- JSON as Python writes it --------------------------------------------------------------------------------------

class Num { constructor(text) { this.text = text; } }

const plain = (value) => (value instanceof Num ? Number(value.text) : value);

// JSON whose numbers keep their spelling, so that they can be written as they were.
function parsed(text) {
  const marked = text.replace(/"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?/g, (found) => (found.startsWith('"') ? found.replace('"', '"s') : `"n${found}"`));
  const restored = (value) => {
    if (typeof value === "string") return value[0] === "s" ? value.slice(1) : new Num(value.slice(1));
    if (Array.isArray(value)) return value.map(restored);
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, one]) => [key.slice(1), restored(one)]));
    return value;
  };
  return restored(JSON.parse(marked));
}

// json.dumps(value, sort_keys=True, separators=(",", ":")).
function python(value) {
  if (value instanceof Num) return value.text;
  if (typeof value === "number") return number(value);
  if (typeof value === "string") return JSON.stringify(value).replace(/[\x7f-\uffff]/g, (c) => (c === "\x7f" ? c : `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`));
  if (Array.isArray(value)) return `[${value.map(python).join(",")}]`;
  if (value && typeof value === "object") return `{${Object.keys(value).sort().map((key) => `${python(key)}:${python(value[key])}`).join(",")}}`;
  return JSON.stringify(value);
}

// As Python's repr has it: 1e-05, where JavaScript has 0.00001.
function number(value) {
  if (Number.isInteger(value) || Math.abs(value) >= 1e-4) return String(value);
  return value.toExponential().replace(/e-(\d)$/, "e-0$1");
}
