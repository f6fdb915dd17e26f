// A plan that runs in the page, behind the interface of HttpClient (client.js): capabilities(), controls(form), draw(form, signal),
// stream(form, signal), edit(form, edit, image, signal), cancel(id). The work is done by web/worker.js:
//
//   page → worker: {key, what: "open" | "check" | "controls" | "draw" | "cancel", value}
//   worker → page: {key, event}, as often as something happened, then {key, end} or {key, error}; {lost} with the GPU
//
// WebAssembly draws first. Where the browser has a GPU, a second worker opens the plan with WebGPU after the first image, and
// takes over if it draws the goldens token for token, and faster. `?engine=wasm` in the page's address keeps to WebAssembly,
// `?engine=webgpu` begins with WebGPU, however fast it is, software included.

import { ClientError, edited } from "./client.js";
import { local } from "./store.js";

// A module of WebAssembly with one instruction on 128-bit vectors.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);
const CONTROLLED_MS = 3000; // after which a page goes on without a service worker that does not come
const AGAIN_MS = 10_000; // within which a page is not loaded anew twice
const PRIVATE = "nothing that you draw leaves this page";

export class Engine extends EventTarget {
  #about = null;
  #opened = null; // {worker, gpu, threads, replaced: a promise once another takes over from it}
  #calls = new Map(); // key → {tell, worker}
  #running = new Map();
  #count = 0;
  #considered = false; // whether WebGPU was tried, or cannot be

  // site: URL of the site's site.json.
  constructor(site) {
    super();
    this.site = new URL(site, document.baseURI);
    this.wish = new URLSearchParams(location.search).get("engine");
  }

  // Opens the plan. Events: "progress" says how far it has come, as a share in `detail`; "backend" that another engine draws now.
  async capabilities() {
    const lacking = missing();
    if (lacking) throw problem(`this browser ${lacking}; open the page in a current Chrome, Edge, Firefox or Safari`);
    await isolate();
    const answer = await fetch(this.site).catch(() => null);
    if (!answer?.ok) throw problem("the page has no connection, and was not here before; go online and load it again");
    this.#about = await answer.json();
    this.#opened?.worker.terminate();
    this.#considered = this.wish === "wasm";
    let without = null;
    if (this.wish === "webgpu") {
      this.#considered = true;
      without = await this.#take();
    }
    if (!this.#opened?.gpu) this.#opened = await this.#open(false, (share) => this.dispatchEvent(new CustomEvent("progress", { detail: share })));
    const plan = { ...this.#about.plan, backend: this.#backend(without), commands: ["car-run", "Python"] };
    return { version: this.#about.version, default_plan: plan.name, plans: [plan], edits: ["branch", "paint", "extend", "restyle"], formats: { preview: "image/png", image: "image/png" } };
  }

  // A worker with the plan open in it.
  async #open(gpu, progress) {
    const worker = new Worker(new URL("web/worker.js", import.meta.url), { type: "module" });
    const opened = { worker, gpu, threads: 1 };
    const each = (data) => { for (const call of this.#calls.values()) if (call.worker === worker) call.tell(data); };
    worker.onmessage = ({ data }) => {
      if (!data.lost) { this.#calls.get(data.key)?.tell(data); return; }
      each({ error: { message: "the GPU was taken away; draw again", status: 503, code: "failed" } });
      if (this.#opened === opened) this.#replace(opened);
    };
    worker.onerror = (event) => each({ error: { message: event.message || "the engine has ended; load the page again", status: 500, code: "failed" } });
    try {
      for await (const event of this.#call("open", { base: new URL(".", this.site).href, about: this.#about, gpu }, undefined, worker)) {
        if (event.type === "progress") progress(event.share);
        else opened.threads = event.threads;
      }
    } catch (error) {
      worker.terminate();
      throw error;
    }
    return opened;
  }

  // Let WebGPU draw, if it is here, draws the goldens and, where WebAssembly draws so far, takes less time for them.
  // Returns what stands against it, null if nothing does.
  async #take() {
    const wished = this.wish === "webgpu";
    const here = `${this.#about.version} ${this.#about.plan.digest}`;
    const lacking = !wished && local.withoutGpu === here ? "WebGPU did not do here before" : await withoutGpu(wished);
    if (lacking) return lacking;
    const before = this.#opened;
    let found = null;
    try {
      found = await this.#open(true, () => {});
      const { exact, seconds } = await this.#once("check", found.worker);
      const least = before ? (await this.#once("check", before.worker)).seconds : Infinity;
      const lost = !exact ? "WebGPU did not draw the plan's goldens" : seconds >= least ? "WebGPU takes longer here" : null;
      if (lost) {
        local.withoutGpu = here;
        found.worker.terminate();
        return lost;
      }
    } catch (error) {
      console.warn(error);
      found?.worker.terminate();
      return "WebGPU failed";
    }
    this.#opened = found;
    this.#retire(before?.worker);
    return null;
  }

  // A GPU may be taken away, or fail: then WebAssembly draws from there on.
  #replace(opened) {
    return (opened.replaced ??= this.#open(false, () => {}).then((found) => {
      this.#opened = found;
      this.#retire(opened.worker);
      this.dispatchEvent(new CustomEvent("backend", { detail: this.#backend("WebGPU failed") }));
    }));
  }

  async #once(what, worker) {
    for await (const made of this.#call(what, {}, undefined, worker)) return made;
  }

  // End a worker when nobody waits for it any more.
  #retire(worker) {
    if (!worker) return;
    if ([...this.#calls.values()].some((call) => call.worker === worker)) setTimeout(() => this.#retire(worker), 1000);
    else worker.terminate();
  }

  // What the page shows. without: why WebGPU does not draw.
  #backend(without) {
    const { gpu, threads } = this.#opened;
    const name = `in this browser, ${gpu ? "WebGPU" : `${threads} thread${threads === 1 ? "" : "s"}`}`;
    return { name: without && this.wish === "webgpu" ? `${name}, as ${without}` : name, why: without ? `${PRIVATE}; ${without}` : PRIVATE };
  }

  async #consider() {
    if (this.#considered) return;
    this.#considered = true;
    const without = await this.#take();
    this.dispatchEvent(new CustomEvent("backend", { detail: this.#backend(without) }));
  }

  async controls(form) {
    for await (const made of this.#call("controls", form)) return made;
  }

  async draw(form, signal) {
    const made = { images: [] };
    for await (const event of this.stream({ ...form, previews: false }, signal)) {
      if (event.type === "queued") made.id = event.id;
      if (event.type === "picture") made.images[event.image] = { index: event.image, seed: event.seed, png: event.png, receipt: event.receipt };
      if (event.type === "done") Object.assign(made, { warnings: event.warnings, timings: event.timings });
    }
    return made;
  }

  async *stream(form, signal) {
    await this.#opened.replaced;
    const opened = this.#opened;
    try {
      yield* this.#call("draw", { form, id: crypto.randomUUID() }, signal, opened.worker);
    } catch (error) {
      if (!opened.gpu || error.code !== "failed") throw error;
      await this.#replace(opened);
      throw problem("WebGPU failed, and WebAssembly goes on; draw again", 503, "failed");
    }
    this.#consider();
  }

  edit(...given) {
    return edited(this, ...given);
  }

  async cancel(id) {
    const key = this.#running.get(id);
    if (key !== undefined) this.#calls.get(key).worker.postMessage({ what: "cancel", value: key });
  }

  // The events of a call. Leaving the loop, and the signal, cancel it.
  async *#call(what, value, signal, worker = this.#opened.worker) {
    const key = ++this.#count;
    const events = [];
    let wake = () => {};
    const tell = (data) => { events.push(data); wake(); };
    this.#calls.set(key, { tell, worker });
    if (value.id) this.#running.set(value.id, key);
    const abort = () => tell({ aborted: true });
    signal?.addEventListener("abort", abort);
    let over = false;
    try {
      signal?.throwIfAborted();
      worker.postMessage({ key, what, value });
      for (;;) {
        while (!events.length) await new Promise((resolve) => { wake = resolve; });
        const { event, end, error, aborted } = events.shift();
        if (aborted) throw signal.reason;
        over = Boolean(end || error);
        if (error) throw problem(error.message, error.status, error.code);
        if (end) return;
        yield event;
      }
    } finally {
      signal?.removeEventListener("abort", abort);
      if (!over) worker.postMessage({ what: "cancel", value: key });
      this.#calls.delete(key);
      if (value.id) this.#running.delete(value.id);
    }
  }
}

const problem = (message, status = 400, code = "page") => new ClientError(status, { message, code });

// What this browser has not that the engine needs; null where it has all.
function missing() {
  if (!self.isSecureContext) return "loads the page without https, which the engine needs";
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD)) return "has no WebAssembly with SIMD";
  if (typeof Worker !== "function" || typeof OffscreenCanvas !== "function" || typeof CompressionStream !== "function") return "lacks parts that the engine needs";
  return null;
}

// What stands against WebGPU; null where it can be tried. software: whether a GPU in software will do.
async function withoutGpu(software) {
  if (navigator.connection?.saveData && !software) return "the browser saves data";
  if (!navigator.gpu || typeof WebAssembly.Suspending !== "function") return "this browser has no WebGPU";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  if (!adapter) return "this browser finds no GPU";
  return adapter.info.isFallbackAdapter && !software ? "the GPU is software" : null;
}

// Threads need a page that is isolated from others. A host that sends no headers for it is helped by the service worker, for
// which the page has to be loaded once more. Without a service worker one thread serves.
async function isolate() {
  const { serviceWorker } = navigator;
  if (!serviceWorker) return;
  try {
    const registration = await serviceWorker.register("sw.js");
    if (registration.waiting && serviceWorker.controller) { // of a site that was made anew, before anything of this one is used
      registration.waiting.postMessage("take");
      if (await controlled(serviceWorker)) await again();
    }
    if (!registration.active) await Promise.race([serviceWorker.ready, ended(registration.installing)]);
    if (!serviceWorker.controller) { // as well after a reload that goes past the service worker
      registration.active.postMessage("claim");
      await controlled(serviceWorker);
    }
    if (self.crossOriginIsolated || Date.now() - sessionStorage.isolated < AGAIN_MS) return;
    sessionStorage.isolated = Date.now();
  } catch (error) { console.warn(error); return; } // private windows of some browsers; a file of the page that is not on the host
  await again();
}

function again() {
  location.reload();
  return new Promise(() => {});
}

// Whether another service worker answers for the page, now or soon.
const controlled = (serviceWorker) => new Promise((resolve) => {
  serviceWorker.addEventListener("controllerchange", () => resolve(true), { once: true });
  setTimeout(() => resolve(false), CONTROLLED_MS);
});

const ended = (worker) => new Promise((_, reject) => {
  const look = () => { if (worker?.state === "redundant") reject(new Error("the service worker cannot be installed")); };
  worker?.addEventListener("statechange", look);
  look();
});
