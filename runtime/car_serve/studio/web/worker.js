// The worker that draws: one plan, one request at a time. Messages: see ../engine.js.

import { encodePng, picture, Refused, toBase64 } from "./codec.js";
import { onGround, WHITE } from "./pixels.js";
import { breathe, Plan } from "./plan.js";
import { writeReceipt } from "./receipt.js";
import { controlMap, resolve } from "./request.js";

const CHECKS = 2; // times that the goldens are drawn, the first of which compiles
const LEVELS = 2; // of grey, by which an image may differ from a golden
const KEPT = 64; // results that can be branched and in-painted by their id
const PATIENCE = 250; // ms: a scale is shown at once if nothing was for so long; else after the image, which is there sooner then

let plan = null;
let site = null;
let turn = Promise.resolve();
const results = new Map(); // id → {tokens, images, part}
const cancelled = new Set();

onmessage = ({ data: { key, what, value } }) => {
  if (what === "cancel") { cancelled.add(value); return; }
  turn = turn.then(async () => {
    try {
      await WORK[what](value, (event) => postMessage({ key, event }), key);
      postMessage({ key, end: true });
    } catch (error) {
      const { message, status = 500, code = "failed" } = error;
      if (!(error instanceof Refused)) console.warn(error);
      postMessage({ key, error: { message, status, code } });
    } finally {
      cancelled.delete(key);
    }
  });
};

const WORK = {
  async open({ base, about, gpu }, tell) {
    site = about;
    plan = await Plan.open(site, base, gpu, (share) => tell({ type: "progress", share }));
    plan.lost?.then(() => postMessage({ lost: true }));
    tell({ type: "opened", threads: plan.threads });
  },

  // Whether the goldens are drawn, token for token and their images, and the seconds that they take once all is warm.
  async check(_, tell) {
    const { goldens } = plan;
    let [exact, seconds] = [goldens.length > 0, Infinity];
    for (let round = 0; round < CHECKS && exact; round++) {
      const began = performance.now();
      for (const golden of goldens) exact &&= await drawsGolden(golden);
      seconds = Math.min(seconds, (performance.now() - began) / 1000);
    }
    tell({ exact, seconds });
  },

  async controls(form, tell) {
    const { square, ...rest } = await controlMap(plan, form);
    tell({ control: toBase64(await encodePng(square)), ...rest });
  },

  async draw({ form, id }, tell, key) {
    const check = () => { if (cancelled.has(key)) throw new Refused("the request was cancelled; send it again", { status: 499, code: "cancelled" }); };
    check();
    const began = performance.now();
    const request = await resolve(plan, form, results);
    const seeds = Array.from({ length: request.n }, (_, i) => request.seed + i);
    tell({ type: "queued", id, place: 0, seeds, warnings: request.warnings });
    const tokens = seeds.map(() => new Int32Array(plan.tokens).fill(-1));
    const images = seeds.map(() => null);
    keep(id, { tokens, images, part: Boolean(request.edit && !request.edit.whole) });
    const timings = {};
    const later = [];
    let shown = began;
    const preview = async (image, index, pixels) => {
      const data = toBase64(await encodePng(onGround(pixels, WHITE)));
      shown = performance.now();
      timings.first_preview ??= (shown - began) / 1000;
      return { id, image, index, preview: data };
    };
    for (const [i, seed] of seeds.entries()) {
      for await (const { index, tokens: drawn, fHat, last } of plan.draw({ ...request, seed })) {
        check();
        tokens[i].set(drawn, plan.scales[index].start);
        const event = { type: "scale", id, image: i, index, side: plan.scales[index].side, last, tokens: [...drawn] };
        if (last) {
          const pixels = await plan.decode(fHat);
          images[i] = request.edit?.frame ? request.edit.frame.finished(pixels) : pixels;
        }
        const now = last || performance.now() - shown > PATIENCE;
        if (request.previews && now) Object.assign(event, await preview(i, index, last ? images[i] : await plan.decode(fHat)));
        else if (request.previews) later.push([i, index, fHat]);
        tell(event);
      }
      check();
      const receipt = receiptOf(request, id, i, seed);
      const finished = onGround(images[i], WHITE);
      const png = await encodePng(finished, await texts(request, receipt, seed, tokens[i], finished));
      tell({ type: "picture", id, image: i, seed, png: toBase64(png), receipt });
    }
    timings.pictures = (performance.now() - began) / 1000;
    for (const [image, index, fHat] of later) {
      await breathe();
      check();
      tell({ type: "preview", ...(await preview(image, index, await plan.decode(fHat))) });
    }
    timings.total = (performance.now() - began) / 1000;
    tell({ type: "done", id, timings, warnings: request.warnings });
  },
};

async function drawsGolden({ branch, control, label, cfg, tokens, image }) {
  const form = { class: label, cfg, top_k: 1, top_p: 0, seed: 0, control: branch ? { [branch]: control } : null };
  for await (const { index, tokens: drawn, fHat, last } of plan.draw(await resolve(plan, form, results))) {
    const { start } = plan.scales[index];
    if (drawn.some((token, i) => token !== tokens[start + i])) return false;
    if (!last) continue;
    const [made, wanted] = [await plan.decode(fHat), await picture(image, "a golden")];
    if (made.data.some((value, i) => Math.abs(value - wanted.data[i]) > LEVELS)) return false;
  }
  return true;
}

function keep(id, result) {
  results.set(id, result);
  if (results.size > KEPT) results.delete(results.keys().next().value);
}

// What differs from the exact loop, by the names of `generate`.
function schedule(request) {
  const K = plan.scales.length;
  const found = {};
  for (const [name, [first, end]] of [["cfg_scales", request.cfgScales], ["control_scales", request.controlScales]]) if (first !== 0 || end !== K) found[name] = `${first}-${end - 1}`;
  if (request.controlStrength !== 1) found.control_strength = request.controlStrength;
  if (request.drawn !== K) found.stop_after = request.drawn - 1;
  return found;
}

function receiptOf(request, id, index, seed) {
  const usual = request.controls.every(({ branch }) => branch === site.plan.defaultBranch);
  const named = site.plan.named ? site.plan.classes[request.label] : null;
  return {
    id, index, version: site.version, plan: plan.manifest.name, backend: "onnxruntime-web",
    class: request.classless ? null : { index: request.label, name: named },
    ...(usual ? {} : { branches: Object.fromEntries(request.controls.map(({ branch, weight }) => [branch, weight])) }),
    seed, cfg: request.cfg, top_k: request.top_k, top_p: request.top_p, ...schedule(request),
    ...(request.edit ? { edit: request.edit.about } : {}),
  };
}

// The text chunks of an image: the studio's receipt, and the runtime's for car-run again, vary and restyle.
async function texts(request, receipt, seed, tokens, finished) {
  const controls = await Promise.all(request.controls.map(async (control) => ({ ...control, png: toBase64(await encodePng(control.image)) })));
  const settings = {
    label: request.classless ? null : request.label, cfg: request.cfg, top_k: request.top_k % plan.model.vocab, top_p: request.top_p,
    ...schedule(request), ...(request.edit?.facts ?? {}), seed,
  };
  return {
    Software: `car_runtime ${site.version}`,
    receipt: JSON.stringify(receipt),
    ...(await writeReceipt(site.plan, settings, tokens, controls, finished)),
  };
}
