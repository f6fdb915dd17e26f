// A plan that runs in the page, behind the interface of HttpClient (client.js): capabilities(), controls(form), draw(form, signal),
// stream(form, signal), edit(form, edit, image, signal), cancel(id). The work is done by web/worker.js:
//
//   page → worker: {key, what: "open" | "controls" | "draw" | "cancel", value}
//   worker → page: {key, event}, as often as something happened, then {key, end} or {key, error}

import { ClientError, edited } from "./client.js";

// A module of WebAssembly with one instruction on 128-bit vectors.
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11);

export class Engine extends EventTarget {
  #worker = null;
  #calls = new Map();
  #running = new Map();
  #count = 0;

  // site: URL of the site's site.json.
  constructor(site) {
    super();
    this.site = new URL(site, document.baseURI);
  }

  // Opens the plan; events "progress" say how far it has come, as shares in `detail`.
  async capabilities() {
    const lacking = missing();
    if (lacking) throw problem(`this browser ${lacking}; open the page in a current Chrome, Edge, Firefox or Safari`);
    await isolate();
    const answer = await fetch(this.site).catch(() => null);
    if (!answer?.ok) throw problem("the page has no connection, and was not here before; go online and load it again");
    const about = await answer.json();
    this.#worker?.terminate();
    this.#worker = new Worker(new URL("web/worker.js", import.meta.url), { type: "module" });
    this.#worker.onmessage = ({ data }) => this.#calls.get(data.key)?.(data);
    this.#worker.onerror = (event) => { for (const tell of this.#calls.values()) tell({ error: { message: event.message || "the engine has ended; load the page again", status: 500, code: "failed" } }); };
    let threads = 1;
    for await (const event of this.#call("open", { base: new URL(".", this.site).href, about })) {
      if (event.type === "progress") this.dispatchEvent(new CustomEvent("progress", { detail: event.share }));
      else ({ threads } = event);
    }
    const backend = { name: `in this browser, ${threads} thread${threads === 1 ? "" : "s"}`, why: "nothing that you draw leaves this page" };
    const plan = { ...about.plan, backend, commands: ["car-run", "Python"] };
    return { version: about.version, default_plan: plan.name, plans: [plan], edits: ["branch", "paint", "extend", "restyle"], formats: { preview: "image/png", image: "image/png" } };
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

  stream(form, signal) {
    return this.#call("draw", { form, id: crypto.randomUUID() }, signal);
  }

  edit(...given) {
    return edited(this, ...given);
  }

  async cancel(id) {
    const key = this.#running.get(id);
    if (key !== undefined) this.#worker.postMessage({ what: "cancel", value: key });
  }

  // The events of a call. Leaving the loop, and the signal, cancel it.
  async *#call(what, value, signal) {
    const key = ++this.#count;
    const events = [];
    let wake = () => {};
    const tell = (data) => { events.push(data); wake(); };
    this.#calls.set(key, tell);
    if (value.id) this.#running.set(value.id, key);
    const abort = () => tell({ aborted: true });
    signal?.addEventListener("abort", abort);
    let over = false;
    try {
      signal?.throwIfAborted();
      this.#worker.postMessage({ key, what, value });
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
      if (!over) this.#worker.postMessage({ what: "cancel", value: key });
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

// Threads need a page that is isolated from others. A host that sends no headers for it is helped by the service worker, for
// which the page has to be loaded once more. Without a service worker one thread serves.
async function isolate() {
  if (!("serviceWorker" in navigator)) return;
  try {
    await navigator.serviceWorker.register("sw.js");
    await navigator.serviceWorker.ready;
    while (!navigator.serviceWorker.controller) await new Promise((resolve) => navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true }));
  } catch { return; } // private windows of some browsers
  if (self.crossOriginIsolated || sessionStorage.isolated) return;
  sessionStorage.isolated = "tried";
  location.reload();
  await new Promise(() => {});
}
