// A plan in the page: its files fetched and checked, its graphs in onnxruntime-web, and the scale loop of car_runtime.generate.
//
// Shapes: B = 1 image; R transformer rows (the image's own, then its twin without class); m branches; h blocks of a branch;
// S side of a scale in tokens; P tokens before it; L tokens of an image; C width; V vocabulary; H heads of width d.

import { resize } from "./pixels.js";
import { sha256 } from "./receipt.js";
import { uniforms } from "./random.js";

const KEPT = 4; // controls and classes whose features are kept
const NO_TOP_P = 2; // what the step is given for "no top-p"
const WEIGHTS = "plan/weights.bin";

export class Plan {
  #files;
  #gpu;
  #onCpu; // graph → names of its nodes that a GPU may not compute
  #ort;
  #sessions = new Map();
  #features = [];
  #conditions = new Map();

  // site: its site.json. base: URL of the site. gpu: whether WebGPU computes. progress: called with shares 0…1. Throws an Error with a
  // sentence.
  static async open(site, base, gpu, progress) {
    const name = gpu ? "ort/ort.jspi.min.mjs" : "ort/ort.wasm.min.mjs";
    const script = import(new URL(name, base)).catch(async () => { await forget(name, base); throw absent(name); });
    const [files, ort] = await Promise.all([fetchAll(site.files, base, gpu, progress), script]);
    files.set(WEIGHTS, spread(files.get(WEIGHTS), site.weights));
    const plan = new Plan();
    plan.manifest = JSON.parse(new TextDecoder().decode(files.get("plan/manifest.json")));
    plan.about = site.plan;
    plan.#files = files;
    plan.#gpu = gpu;
    plan.#onCpu = site.on_cpu;
    plan.#ort = engine(ort, base, files.get(binary(gpu)));
    for (const graph of ["step", "condition", "decoder", ...plan.branches.flatMap((name) => [`control.${name}`, `branch.${name}`])]) await plan.#session(graph);
    if (gpu) plan.lost = (await plan.#ort.env.webgpu.device).lost; // where it is, nothing that runs ever ends
    return plan;
  }

  get scales() { return this.manifest.scales; }
  get model() { return this.manifest.model; }
  get branches() { return Object.keys(this.model.branches ?? {}); }
  get tokens() { return this.scales.at(-1).stop; }
  get threads() { return this.#ort.env.wasm.numThreads; }

  // Scale after scale: {index, tokens: Int32Array [S·S], fHat, last}. request: see request.js. Waits between scales for messages.
  async *draw(request) {
    const { scales, model } = this;
    const noise = uniforms(request.seed, this.tokens);
    const labels = (rows) => [request.label, ...(rows > 1 ? [model.classes] : [])];
    const unguidedFrom = request.guided ? Math.min(request.cfgScales[1], request.drawn) : 0;
    let rows = unguidedFrom > 0 ? 2 : 1;
    let steering = await this.#steering(request, labels(rows));
    const features = await Promise.all(request.controls.map(({ branch, image }) => this.#controlFeatures(branch, image)));
    const caches = { step: this.#cache("step", model.depth, rows) };
    for (const { branch } of request.controls) caches[branch] = this.#cache(`branch.${branch}`, model.branches[branch].cache_layers, rows);
    let x = steering.start;
    let fHat = new Float32Array(model.latent_channels * model.latent_size ** 2);
    for (let k = 0; k < request.drawn; k++) {
      if (rows > 1 && k >= unguidedFrom) {
        rows = 1;
        x = x.slice(0, x.length / 2);
        steering = await this.#steering(request, labels(1));
        for (const cache of Object.values(caches)) cache.narrow(scales[k].start);
      }
      const scale = scales[k];
      const N = scale.tokens;
      const feeds = { x, f_hat: fHat, modulation: steering.modulation, rows: Array(rows).fill(0), twin: [rows - 1], plain: [0], control_cfg: [0], smooth: [false] };
      Object.assign(feeds, this.#constants(k), caches.step.past(scale.start));
      const inCfg = k >= request.cfgScales[0] && k < request.cfgScales[1];
      Object.assign(feeds, {
        uniforms: noise.subarray(scale.start, scale.stop),
        cfg: [request.guided && inCfg ? request.cfg : 0],
        top_k: [request.top_k],
        top_p: [request.top_p > 0 ? request.top_p : NO_TOP_P],
        known: request.known ? request.known.subarray(scale.start, scale.stop) : new Int32Array(N),
        known_mask: request.knownMask ? request.knownMask.subarray(scale.start, scale.stop) : new Uint8Array(N),
      });
      if (this.branches.length) Object.assign(feeds, await this.#mixed(request, k, rows, x, steering, features, caches));
      const made = await this.#run("step", feeds, { R: rows, B: 1, S: scale.side, P: scale.start, m: Math.max(1, request.controls.length) }, (name) => name !== "logits");
      caches.step.take(made, scale);
      x = made.next_x.data;
      fHat = made.f_hat_out.data;
      yield { index: k, tokens: Int32Array.from(made.tokens.data, Number), fHat, last: k === request.drawn - 1 };
      await breathe();
    }
  }

  // What the plan's export computed, and greedy: [{branch, control, label, cfg, tokens, image}], images in base64.
  get goldens() { return JSON.parse(new TextDecoder().decode(this.#files.get("plan/goldens.json"))); }

  // f̂ → RGB image.
  async decode(fHat) {
    const size = this.model.image_size;
    const { image } = await this.#run("decoder", { f_hat: fHat }, { B: 1 });
    return { width: size, height: size, channels: 3, data: new Uint8Array(image.data) };
  }

  // RGB of the model's size → tokens, Int32Array [L].
  async encode(image) {
    const { tokens } = await this.#run("encoder", { image: image.data }, { B: 1 });
    return Int32Array.from(tokens.data, Number);
  }

  // ---- what steers the transformer ---------------------------------------------------------------------------------

  async #steering(request, labels) {
    const key = JSON.stringify([labels, request.controls.map(({ branch }) => branch)]);
    if (!this.#conditions.has(key)) {
      const R = labels.length;
      const { start, modulation } = await this.#run("condition", { label: labels }, { R });
      const made = { start: start.data, modulation: modulation.data, branches: {} };
      for (const { branch } of request.controls) {
        const graph = `condition.${branch}`;
        if (graph in this.manifest.graphs) made.branches[branch] = (await this.#run(graph, { label: labels }, { R })).modulation.data;
      }
      this.#conditions.set(key, made);
      if (this.#conditions.size > 2 * KEPT) this.#conditions.delete(this.#conditions.keys().next().value);
    }
    return this.#conditions.get(key);
  }

  // The features of a control at all scales, Float32Array [L·C].
  async #controlFeatures(branch, image) {
    const known = this.#features.find((one) => one.branch === branch && equal(one.data, image.data));
    if (known) return known.features;
    const inputs = {};
    this.scales.forEach(({ control_size: side }, k) => { inputs[`control_${k}`] = resize(image, side, side, "bicubic").data; });
    const { features } = await this.#run(`control.${branch}`, inputs, {});
    this.#features.unshift({ branch, data: image.data, features: features.data });
    this.#features.length = Math.min(KEPT, this.#features.length);
    return features.data;
  }

  // What the branches give one scale of the step; without any, the idle branch, which it weighs by 0.
  async #mixed(request, k, rows, x, steering, features, caches) {
    const [scale, C] = [this.scales[k], this.model.width];
    const used = request.controls.length ? request.controls : [{ branch: this.model.default_branch, weight: 0 }];
    const per = this.model.branches[used[0].branch].blocks * scale.tokens * rows * C;
    const c = new Float32Array(used.length * per);
    const mix = used.flatMap(({ weight }) => Array(rows).fill(weight));
    const sum = used.reduce((total, { weight }) => Math.fround(total + Math.fround(weight)), 0);
    for (const [i, { branch }] of request.controls.entries()) {
      const strength = k >= request.controlScales[0] && k < request.controlScales[1] ? Math.fround(request.controlStrength) : 0;
      const part = features[i].subarray(scale.start * C, scale.stop * C);
      const feeds = {
        x, rows: Array(rows).fill(0), pos: this.#constants(k).pos, modulation: steering.branches[branch],
        control: strength === 1 ? part : part.map((value) => (strength === 0 ? 0 : value * strength)),
        ...caches[branch].past(scale.start),
      };
      const made = await this.#run(`branch.${branch}`, feeds, { R: rows, B: 1, S: scale.side, P: scale.start });
      caches[branch].take(made, scale);
      c.set(made.c.data, i * per);
    }
    return { c, mix, keep: Array(rows).fill(1 - sum), ...this.#fusions(used.map(({ branch }) => branch)) };
  }

  // Step input name → the parameters of 𝓖, stacked over the branches.
  #fusions(branches) {
    const key = `fusions ${branches}`;
    if (!this.#sessions.has(key)) {
      const found = {};
      for (const { name } of this.manifest.graphs.step.inputs) {
        const match = /^fusion_(.+)_(\d+)$/.exec(name);
        if (!match) continue;
        const parts = branches.map((branch) => this.#stored(this.manifest.parameters[`branches.${branch}.fusions.${match[2]}.${match[1].replace("_", ".")}`]));
        found[name] = new Float32Array(parts.length * parts[0].length);
        parts.forEach((part, i) => found[name].set(part, i * part.length));
      }
      this.#sessions.set(key, found);
    }
    return this.#sessions.get(key);
  }

  #constants(k) {
    const key = `constants ${k}`;
    if (!this.#sessions.has(key)) this.#sessions.set(key, Object.fromEntries(Object.entries(this.scales[k].constants).map(([port, name]) => [port, this.#constant(name)])));
    return this.#sessions.get(key);
  }

  // With its own shape, which differs from scale to scale.
  #constant(name) {
    const entry = this.manifest.tensors[name];
    const data = this.#stored(entry);
    return new this.#ort.Tensor(entry.dtype, data, entry.shape);
  }

  #stored({ dtype, offset, bytes }) {
    const raw = this.#files.get(WEIGHTS).slice(offset, offset + bytes).buffer;
    if (dtype === "float32") return new Float32Array(raw);
    if (dtype === "int64") return new BigInt64Array(raw);
    if (dtype === "float16") return Float32Array.from(new Uint16Array(raw), half);
    if (dtype === "bfloat16") return new Float32Array(Uint32Array.from(new Uint16Array(raw), (bits) => bits << 16).buffer);
    throw new Error(`the plan stores ${dtype}, which the page cannot read; export it again`);
  }

  // ---- graphs ------------------------------------------------------------------------------------------------------

  async #session(graph) {
    if (!this.#sessions.has(graph)) {
      const bytes = this.#files.get(`plan/${this.manifest.graphs[graph].file}`);
      const onCpu = this.#onCpu[graph];
      this.#sessions.set(graph, await this.#ort.InferenceSession.create(bytes, {
        executionProviders: [this.#gpu ? { name: "webgpu", ...(onCpu ? { forceCpuNodeNames: onCpu } : {}) } : "wasm"],
        logSeverityLevel: 3, // that nodes compute on the CPU is a warning elsewhere
        externalData: [{ path: "weights.bin", data: this.#files.get(WEIGHTS) }],
      }));
    }
    return this.#sessions.get(graph);
  }

  // Run a graph. sizes: what its symbolic dimensions are. wanted: which outputs.
  async #run(graph, values, sizes, wanted = () => true) {
    const session = await this.#session(graph);
    const { inputs, outputs } = this.manifest.graphs[graph];
    const feeds = {};
    for (const { name, dtype, shape } of inputs) {
      const value = values[name];
      if (value instanceof this.#ort.Tensor) { feeds[name] = value; continue; }
      const dims = shape.map((dim) => (typeof dim === "number" ? dim : sizes[dim]));
      const count = dims.reduce((product, dim) => product * dim, 1);
      feeds[name] = new this.#ort.Tensor(dtype, typed(dtype, value ?? new Float32Array(count)), dims);
    }
    return session.run(feeds, outputs.map(({ name }) => name).filter(wanted));
  }

  #cache(graph, layers, rows) {
    const { outputs } = this.manifest.graphs[graph];
    const [H, d] = outputs.find(({ name }) => name === "new_k_0")?.shape.slice(2) ?? [0, 0];
    return new Cache(layers, this.tokens, rows, H * d);
  }
}

// K and V of each layer, [L, R, H·d]: the past of a scale is the beginning of it.
class Cache {
  constructor(layers, tokens, rows, width) {
    this.rows = rows;
    this.width = width;
    this.values = {};
    for (let i = 0; i < layers; i++) for (const kind of "kv") this.values[`${kind}_${i}`] = new Float32Array(tokens * rows * width);
  }

  past(start) {
    return Object.fromEntries(Object.entries(this.values).map(([name, values]) => [`past_${name}`, values.subarray(0, start * this.rows * this.width)]));
  }

  take(made, scale) {
    for (const [name, values] of Object.entries(this.values)) values.set(made[`new_${name}`].data, scale.start * this.rows * this.width);
  }

  // The image's own row alone, of the tokens before `start`.
  narrow(start) {
    const { rows, width } = this;
    for (const [name, old] of Object.entries(this.values)) {
      const values = new Float32Array(old.length / rows);
      for (let p = 0; p < start; p++) values.set(old.subarray(p * rows * width, p * rows * width + width), p * width);
      this.values[name] = values;
    }
    this.rows = 1;
  }
}

// onnxruntime-web, on as many threads as the page may have.
function engine(ort, base, wasm) {
  ort.env.wasm.wasmPaths = new URL("ort/", base).href;
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
  ort.env.logLevel = "error";
  return ort;
}

const absent = (path) => new Error(`${path} cannot be fetched; see that the whole site was copied, and load the page again`);
const binary = (gpu) => `ort/ort-wasm-simd-threaded${gpu ? ".jspi" : ""}.wasm`;

// A file that is no good is not kept by the service worker, so that the page works once the host has the right one.
async function forget(path, base) {
  for (const name of await caches.keys().catch(() => [])) await (await caches.open(name)).delete(new URL(path, base));
}

// The files that site.json lists and an engine reads, by path, each with the size and digest that it states.
async function fetchAll(listed, base, gpu, progress) {
  const wanted = Object.entries(listed).filter(([path]) => path.startsWith("plan/") || path === binary(gpu));
  const total = wanted.reduce((sum, [, { bytes }]) => sum + bytes, 0);
  let got = 0;
  return new Map(await Promise.all(wanted.map(async ([path, { bytes, sha256: digest }]) => {
    const answer = await fetch(new URL(path, base)).catch(() => null);
    if (!answer?.ok) throw absent(path);
    const data = new Uint8Array(bytes);
    let at = 0;
    for (const reader = answer.body.getReader(); ; ) {
      const { done, value } = await reader.read();
      if (done) break;
      if (at + value.length > bytes) { at = Infinity; break; }
      data.set(value, at);
      at += value.length;
      got += value.length;
      progress(got / total);
    }
    if (at === bytes && (await sha256(data)) === digest) return [path, data];
    await forget(path, base);
    throw new Error(`${path} is not the file that the site was made with; copy the site again, and load the page anew`);
  })));
}

// weights.bin with its pieces where the plan has them; between them, where branches are that the site leaves out, it is 0.
function spread(packed, { bytes, pieces }) {
  if (packed.length === bytes) return packed;
  const data = new Uint8Array(bytes);
  let at = 0;
  for (const [offset, length] of pieces) {
    data.set(packed.subarray(at, at + length), offset);
    at += length;
  }
  return data;
}

const TYPES = { float32: Float32Array, uint8: Uint8Array, bool: Uint8Array };

function typed(dtype, value) {
  if (dtype === "int64") return value instanceof BigInt64Array ? value : BigInt64Array.from(value, (one) => BigInt(one));
  const kind = TYPES[dtype];
  return value instanceof kind ? value : kind.from(value);
}

function half(bits) {
  const [sign, exponent, fraction] = [bits & 0x8000 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 0) return sign * fraction * 2 ** -24;
  return exponent === 31 ? (fraction ? NaN : sign * Infinity) : sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const equal = (one, other) => one.length === other.length && one.every((value, i) => value === other[i]);

// A turn of the event loop, so that a message that cancels is heard; timers would take 4 ms.
const channel = new MessageChannel();
const turns = [];
channel.port1.onmessage = () => turns.shift()();
export const breathe = () => new Promise((resolve) => { turns.push(resolve); channel.port2.postMessage(0); });
