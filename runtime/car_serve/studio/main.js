// The studio: wires the pad, the form, the stage and the history to a client.

import { HttpClient } from "./client.js";
import { commandOf } from "./commands.js";
import { Form } from "./form.js";
import { $, button, controlOf, fromBase64, make, note, save, sentence, toBase64, url } from "./page.js";
import { Paper } from "./paper.js";
import { textOf } from "./png.js";
import { Stage } from "./stage.js";
import * as store from "./store.js";

const EXAMPLES = [ // image, class, kind
  ["umbrella", "fluent-travel-places", "canny"], ["heart", "fluent-smileys-emotion", "sketch"], ["guitar", "fluent-objects", "hed"],
  ["cupcake", "fluent-food-drink", "depth"], ["maple-leaf", "fluent-animals-nature", "normal"],
];
const KINDS = { canny: "Canny edges", hed: "HED edges", sketch: "a sketch", depth: "a depth map", normal: "a normal map" };
const MOST_PIXELS = 1 << 24;
const DRAFT_MS = 0; // of rest between two drafts: a turn of the event loop, in which the pen is heard

// A site without a server says so in its page, and runs the plan there.
const site = document.querySelector("meta[name=site]")?.content;
export const client = site ? new (await import("./engine.js")).Engine(site) : new HttpClient();
const form = new Form();
const pad = new Paper($("pad"), { ink: "#fff", ground: "#000" });
const stage = new Stage({ branch, restyle, stop, paint, extend, remix, download, copy });
let plan = null;
let running = null; // {controller, id, kind}
let results = [];
let restored = false;

// ---- drawing -------------------------------------------------------------------------------------------------------

function request() {
  const values = form.values();
  if (plan.controls.length) values.control = named(pad.map(plan.image_size));
  return values;
}

// An image for the branch that is followed, the plan's default branch without its name.
const named = (image) => ($("follows").value === (plan.controls[0]?.type ?? "") ? image : { [$("follows").value]: image });

async function draw() {
  note("message");
  if (!form.check()) return;
  if (plan.controls.length && pad.blank) {
    note("pad-note", "The drawing is blank, so there is nothing to follow.", "warn", ["Start from an example", () => example(...examples()[0])]);
    return;
  }
  if (!form.locked && !$("live").checked) form.roll();
  await run(request(), { kind: "draw" });
}

// Draw a form and show it as it comes. The latest wins: what runs is cancelled. Returns the result, or null.
async function run(values, { kind, edit = null, image = null, before = null, quiet = false }) {
  cancel();
  const mine = { controller: new AbortController(), id: null, kind };
  running = mine;
  const { control, ...rest } = values;
  const old = stage.current?.png ?? null;
  const result = { key: Date.now(), id: null, form: rest, control, images: [], before: before ?? old, edit: asked(edit), kind, live: kind === "live" };
  for (let i = 0; i < values.n; i++) result.images.push({ seed: values.seed + i, png: null, scales: [], old: values.n === 1 ? old : null });
  if (!quiet) { setBusy(true); note("message", "Drawing", "said"); note("image-note"); }
  try {
    const signal = mine.controller.signal;
    const events = edit ? client.edit(values, edit, image, signal) : client.stream(values, signal);
    for await (const event of events) {
      if (running !== mine) return null;
      take(event, result, mine, quiet);
    }
    for (const image of result.images) delete image.old;
    if (!result.images.every((image) => image.png)) throw new Error("the stream ended before its images; draw again");
    if (!quiet) { note("message"); await remember(result); }
    return result;
  } catch (error) {
    if (running === mine) fail(error, result, values, { kind, edit, image, before, quiet });
    return null;
  } finally {
    if (running === mine) { running = null; setBusy(false); }
  }
}

// Of an edit, what was asked for, without whence the image came.
function asked(edit) {
  if (!edit) return null;
  const { id: _, index: __, ...how } = edit;
  return how;
}

function take(event, result, mine, quiet) {
  if (event.type === "queued") {
    mine.id = result.id = event.id;
    if (!quiet && event.place > 0) note("message", `${event.place} ahead in the queue.`);
    if (!quiet || event.warnings.length) warn(event.warnings);
  } else if (event.type === "scale" || event.type === "preview") {
    if (!event.preview) return;
    result.images[event.image].scales[event.index] = fromBase64(event.preview, capabilities.formats.preview);
    const drawn = result.images.reduce((sum, image) => sum + image.scales.length, 0);
    if (!quiet) stage.busy(drawn / (result.images.length * ((result.form.stop_after ?? plan.scales.length - 1) + 1)));
    stage.show(result);
  } else if (event.type === "picture") {
    const image = result.images[event.image];
    Object.assign(image, { png: fromBase64(event.png, "image/png"), receipt: event.receipt, seed: event.seed });
    stage.show(result);
  }
}

function cancel() {
  if (!running) return;
  const { controller, id } = running;
  running = null;
  controller.abort();
  if (id) client.cancel(id).catch(() => {});
  setBusy(false);
}

function stopped() {
  if (!running) return;
  cancel();
  note("message", "Cancelled.");
  stage.show(results.find((result) => result.key === stage.result?.key) ?? results[0] ?? null);
}

// Errors appear where their cause is, with a way out.
function fail(error, result, values, again) {
  if (error.name === "AbortError") return;
  const retry = ["Try again", () => run(values, again)];
  const words = sentence(error.message);
  if (result.images.every((image) => !image.png)) stage.show(results[0] ?? null);
  if (error.status === 429) note("message", `The queue is full. A place should be free in ${error.retryAfter ?? 1} s.`, "warn", retry);
  else if (again.edit && error.status >= 400 && error.status < 500) note("image-note", words, "bad");
  else note("message", words, "bad", error.status === 400 || error.status === 422 ? null : retry);
}

function warn(warnings) {
  const inverted = warnings.find((line) => line.includes("inverted"));
  if (inverted) note("pad-note", "This map looks inverted: its lines should be light on dark.", "warn", ["Invert it", mend]);
  else if (warnings.length) note("pad-note", sentence(warnings[0]), "warn");
  else note("pad-note");
}

function mend() {
  pad.invert();
  note("pad-note", "Inverted.", "", ["Undo", () => pad.undo()]);
}

function setBusy(on) {
  $("draw").classList.toggle("busy", on);
  $("draw").firstElementChild.textContent = on ? "Cancel" : "Draw";
  $("draw").lastElementChild.textContent = on ? "Esc" : "Enter";
  stage.busy(on ? 0 : null);
}

// ---- live: drafts without guidance while the pen moves, a full one when it rests -----------------------------------

const DRAFT_FRAMES = [60, 100]; // ms; a draft that takes longer leaves out its finest scale next time, a faster one gets it back
let dirty = false;
let drafting = false;
let finest = 0; // scale of a draft; the first is as coarse as they get, so that it is there at once

function draft() {
  const last = plan.scales.length - 1;
  finest = Math.min(last, Math.max(last >> 1, finest));
  return { ...request(), n: 1, cfg: 0, previews: false, stop_after: finest };
}

// A draft that nobody sees when live mode is switched on, so that the first stroke finds everything at work.
async function warmUp() {
  if (!$("live").checked || !plan) return;
  try { for await (const _ of client.stream(draft())); } catch { /* the stroke will say what is wrong */ }
}

async function live() {
  dirty = true;
  if (drafting || !$("live").checked || !plan) return;
  drafting = true;
  while (dirty && $("live").checked) {
    dirty = false;
    const began = performance.now();
    const drawn = await run(draft(), { kind: "draft", quiet: true });
    const took = performance.now() - began;
    if (drawn) finest += took > DRAFT_FRAMES[1] ? -1 : took < DRAFT_FRAMES[0] ? 1 : 0;
    await new Promise((resolve) => setTimeout(resolve, DRAFT_MS));
  }
  drafting = false;
}

async function rest() {
  if (!$("live").checked || !plan || pad.blank) return;
  dirty = false;
  await run(request(), { kind: "live" });
}

// ---- edits ---------------------------------------------------------------------------------------------------------

const source = () => ({ id: stage.result.id, index: stage.image });

async function edited(kind, how, changes = {}) {
  if (!form.check()) return null;
  const { current } = stage;
  const image = current.png ? await toBase64(current.png) : null;
  const values = { ...request(), ...changes };
  if (kind !== "extend") values.control = stage.result.control ?? values.control;
  return run(values, { kind, edit: { ...source(), ...how }, image, before: current.png });
}

async function branch(scale) {
  await edited("branch", { scale }, { seed: form.another() });
}

// Another class on the same coarse scales and the same seed.
async function restyle(scale) {
  if ((stage.current.receipt?.class?.name ?? "") === $("class").value) {
    note("image-note", "Choose another class first, then restyle.", "warn", ["Choose", () => { $("class").focus(); $("class").click(); }]);
    return;
  }
  await edited("restyle", { scale }, { seed: stage.current.seed, n: 1 });
}

// As far as a scale. An edit's coarse scales are not those of its seed alone: they are kept as they are.
async function stop(scale) {
  const { form: made, control } = stage.result, { current } = stage;
  const values = { ...made, control, seed: current.seed, n: 1, stop_after: scale };
  if (!current.receipt?.edit) return run(values, { kind: "stop", before: current.png });
  return run(values, { kind: "stop", edit: { ...source(), scale }, image: await toBase64(current.png), before: current.png });
}

async function paint() {
  if (stage.mask.blank) { note("image-note", "Paint over what is to be drawn anew.", "warn"); return; }
  const mask = stage.mask.mask((await createImageBitmap(stage.current.png)).width);
  await edited("paint", { mask }, { n: 1, seed: form.another() });
}

async function extend() {
  pad.place(stage.frame);
  await edited("extend", { frame: stage.frame }, { n: 1, seed: form.another() });
}

async function remix() {
  await recall(stage.result, stage.current);
  form.roll();
  await run(request(), { kind: "draw" });
}

// ---- taking results away -------------------------------------------------------------------------------------------

function download() {
  if (stage.current?.png) save(stage.current.png, `image-${stage.current.seed}.png`);
}

async function copy(kind) {
  const made = commandOf(kind, stage.result, stage.current, planOf(stage.result), location.origin);
  stage.setMode("view");
  if (!made) { note("image-note", "The image that this one was made from is not in the file, so there is no command for it.", "warn"); return; }
  const names = Object.keys(made.files);
  const way = names.length ? [`Save ${names.length > 1 ? "these files" : names[0]}`, () => { for (const name of names) save(made.files[name], name); }] : null;
  try {
    await navigator.clipboard.writeText(made.words);
    note("image-note", `Copied as ${kind}.${names.length ? ` It reads ${names.join(", ")}.` : ""}`, "", way);
  } catch {
    note("image-note", made.words, "", way);
  }
}

// ---- history -------------------------------------------------------------------------------------------------------

async function remember(result) {
  const last = results[0];
  if (result.live && last?.live) { results.shift(); await store.remove(last.key); }
  results.unshift(result);
  history();
  await store.save(result).catch(() => note("image-note", "The browser has no room left; this image is not kept in the history.", "warn"));
}

function history() {
  const items = results.map((result) => {
    const image = result.images[result.selected ?? 0];
    const label = image.receipt?.class?.name ?? "any class";
    const seed = image.seed ?? "unknown";
    const open = make("button", { type: "button", "aria-label": `Show ${label}, seed ${seed}`, title: label, onclick: () => recall(result, image) }, make("img", { src: url(image.png), alt: "" }));
    if (result === stage.result) open.setAttribute("aria-current", "true");
    const gone = make("button", { type: "button", class: "remove", "aria-label": `Remove ${label}, seed ${seed}`, onclick: () => forget(result) });
    gone.append(button("close", "").firstChild);
    return make("li", {}, open, gone);
  });
  $("history").replaceChildren(...(items.length ? items : [make("li", { class: "none" }, "Your images stay here.")]));
}

async function forget(result) {
  results = results.filter((other) => other !== result);
  await store.remove(result.key);
  if (stage.result === result) stage.show(results[0] ?? null);
  history();
}

const planOf = (result) => capabilities.plans.find((one) => one.name === result.form.plan) ?? plan;

// Everything as it was: the drawing, the settings, the image.
async function recall(result, image = result.images[0]) {
  if (running) cancel();
  if (planOf(result) !== plan) use(planOf(result));
  stage.show(result);
  history();
  form.set({ cfg_scales: "", control_scales: "", ...result.form, class: image.receipt?.class ?? result.form.class ?? "", seed: image.seed });
  const control = controlOf(result.control);
  if (control) {
    follow(control.type ?? plan.controls[0].type);
    pad.put(await createImageBitmap(fromBase64(control.map, "image/png")));
  }
  note("message");
}

// ---- bringing images -----------------------------------------------------------------------------------------------

async function bring(blob) {
  if (!blob?.type.startsWith("image/")) { note("pad-note", "That is no image; bring a PNG, JPEG, WebP or TIFF.", "bad"); return; }
  try {
    const texts = blob.type === "image/png" ? await textOf(blob) : {};
    const about = aboutOf(texts);
    if (about) await restore(blob, about, texts["car-control"]);
    else await convert(await small(blob));
  } catch (error) {
    const unread = error.status === 400;
    note("pad-note", unread ? "That file cannot be read as an image; bring a PNG, JPEG, WebP or TIFF." : sentence(error.message), "bad");
  }
}

// What a PNG says of itself: the studio's receipt, or the one that car-run writes, in the same words; null where it has neither.
function aboutOf(texts) {
  try {
    if (texts.receipt) return JSON.parse(texts.receipt);
    const { name, settings: { label, ...settings }, branches } = JSON.parse(texts["car-receipt"]).receipt;
    const classes = capabilities.plans.find((one) => one.name === name)?.classes;
    return { ...settings, plan: name, branches, class: label === null ? null : { index: label, name: classes?.[label] } };
  } catch { return null; }
}

// An image of as many pixels as an engine reads; phones take larger ones.
async function small(blob) {
  const bitmap = await createImageBitmap(blob).catch(() => null);
  const scale = bitmap ? Math.sqrt(MOST_PIXELS / (bitmap.width * bitmap.height)) : 1;
  if (scale >= 1) return blob;
  const canvas = new OffscreenCanvas(Math.max(1, Math.floor(bitmap.width * scale)), Math.max(1, Math.floor(bitmap.height * scale)));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.convertToBlob({ type: "image/jpeg", quality: 0.95 });
}

// A PNG that was drawn before holds its settings and its control.
async function restore(blob, about, control) {
  const given = {};
  for (const name of ["cfg", "top_k", "top_p", "control_strength", "cfg_scales", "control_scales", "stop_after"]) if (about[name] != null) given[name] = about[name];
  const seed = Number.isSafeInteger(about.seed) ? about.seed : undefined; // car-run's go to 2⁶³
  const values = { ...given, plan: about.plan, seed, n: 1, class: about.class?.name ?? about.class?.index };
  const branches = Array.isArray(about.branches) ? about.branches : Object.entries(about.branches ?? {});
  const [[branch, weight] = []] = branches;
  const alone = branches.length === 1 && weight === 1 && planOf({ form: values }).controls.some(({ type }) => type === branch);
  const followed = control && alone ? { [branch]: control } : control;
  const result = { key: Date.now(), id: about.id, form: values, control: followed ?? null, images: [{ seed, png: blob, receipt: about, scales: [] }], before: null };
  await remember(result);
  await recall(result);
  if ((about.branches && !alone) || about.control_cfg) note("pad-note", "The image is restored. It follows branches or guidance that the studio does not draw with.", "warn");
  else if (seed === undefined) note("pad-note", "The image is restored. Its seed is larger than the studio draws with.", "warn");
  else note("pad-note", "Restored: the drawing, the settings and the image.");
  await replay(result, blob);
}

// The scales of a PNG that was brought: drawn again from the tokens in it.
async function replay(result, blob) {
  const [image] = result.images;
  const form = { ...result.form, ...(result.control ? { control: result.control } : {}) };
  try {
    for await (const event of client.stream({ ...form, edit: { image: await toBase64(blob), scale: planOf(result).scales.length - 1 } })) {
      if (event.preview) image.scales[event.index] = fromBase64(event.preview, capabilities.formats.preview);
    }
  } catch { return; } // of another plan, or nobody has time: the image is there without them
  if (stage.result === result) stage.render();
  await store.save(result).catch(() => {});
}

// A photo becomes a map, which can be edited; a map is taken as it is.
async function convert(blob) {
  const data = await toBase64(blob);
  note("pad-note", "Reading…");
  const as = { plan: plan.name };
  const map = await client.controls({ ...as, control: named(data) });
  const isPhoto = map.warnings.some((line) => /coloured|looks like a photo/.test(line));
  const made = isPhoto ? await client.controls({ ...as, photo: named(data) }) : map;
  pad.put(await createImageBitmap(fromBase64(made.control, "image/png")));
  warn(made.warnings);
  if (isPhoto && !$("pad-note").textContent) {
    const kind = controlsOf(made.type)?.convention?.control_type;
    const what = ["depth", "normal", "sketch"].includes(kind) ? `This is the photo's ${kind} map` : "These are the photo's edges";
    note("pad-note", `${what}; draw and erase as you like.`, "", ["Use the image as it is", async () => { pad.put(await createImageBitmap(fromBase64(map.control, "image/png"))); warn([]); }]);
  }
}

// Those of the kinds that the plan follows.
function examples() {
  const found = EXAMPLES.filter(([, , type]) => controlsOf(type));
  return found.length ? found : EXAMPLES;
}

async function example(name, label, type) {
  const blob = await (await fetch(`studio/${name}.png`)).blob();
  follow(type);
  pad.put(await createImageBitmap(blob));
  if (plan.classes.includes(label)) form.set({ class: label });
  await draw();
}

// ---- the page ------------------------------------------------------------------------------------------------------

function padChanged() {
  const blank = !pad.canUndo && !restored;
  $("empty").hidden = !blank;
  $("undo").disabled = !pad.canUndo;
  $("redo").disabled = !pad.canRedo;
  $("clear").disabled = blank;
}

const pick = (tool) => {
  pad.tool = tool;
  for (const id of ["brush", "eraser"]) $(id).setAttribute("aria-pressed", id === tool);
};

function resize(by) {
  $("size").value = Number($("size").value) + by;
  $("size").dispatchEvent(new Event("input"));
}

const undo = () => (stage.mode === "mask" ? stage.mask.undo() : pad.undo());
const redo = () => (stage.mode === "mask" ? stage.mask.redo() : pad.redo());
const mode = (name) => { if (stage.current?.png && (name !== "compare" || stage.result.before)) stage.setMode(stage.mode === name ? "view" : name); };

// By the letter on the key, whatever the layout; [help, keys, action].
const KEYS = [
  ["Draw", ["Enter"], () => (running ? null : draw())],
  ["Cancel, back", ["Escape"], () => (running ? stopped() : stage.mode !== "view" ? stage.setMode("view") : stage.pin(null))],
  ["Brush, eraser", ["b", "e"], (key) => pick(key === "b" ? "brush" : "eraser")],
  ["Brush size", ["[", "]", "-", "+"], (key) => resize("[-".includes(key) ? -3 : 3)],
  ["Undo, redo", ["Ctrl+Z", "Ctrl+Shift+Z"], null],
  ["Clear", ["Delete"], () => pad.clear()],
  ["Bring an image", ["o"], () => $("file").click()],
  ["Another seed", ["r"], () => form.roll()],
  ["Live", ["l"], () => $("live").click()],
  ["In-paint, extend, compare", ["m", "x", "c"], (key) => mode({ m: "mask", x: "extend", c: "compare" }[key])],
  ["Download", ["d"], download],
  ["Draw by keyboard, on the pad", ["Shift+Arrows"], null],
  ["This sheet", ["?"], () => $("sheet").showModal()],
];

function keydown(event) {
  if ($("sheet").open) return;
  // On a layout without Latin letters the key's place stands for the letter.
  const key = /^[ -~]$/.test(event.key) ? event.key.toLowerCase() : /^Key/.test(event.code) ? event.code[3].toLowerCase() : event.key;
  if ((event.ctrlKey || event.metaKey) && !event.altKey) {
    if (key === "z" && !isText(event.target)) { event.preventDefault(); event.shiftKey ? redo() : undo(); }
    else if (key === "y" && !isText(event.target)) { event.preventDefault(); redo(); }
    else if (key === "Enter") draw();
    return;
  }
  if (event.metaKey || (event.altKey && !event.ctrlKey && /^[a-z]$/.test(key))) return;
  if (key !== "Escape" && isText(event.target)) return;
  if (key === "Enter" && event.target.closest?.("button, summary, select, input, a")) return;
  const found = KEYS.find(([, keys]) => keys.includes(key));
  if (!found?.[2]) return;
  event.preventDefault();
  found[2](key);
}

const isText = (node) => node.matches?.("input[type=text], textarea, select");

function theme() {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = store.local.theme = dark ? "light" : "dark";
}

function listen() {
  let saving;
  pad.addEventListener("change", () => { padChanged(); live(); });
  pad.addEventListener("stroke", () => {
    rest();
    clearTimeout(saving);
    saving = setTimeout(() => {
      store.keep("follows", $("follows").value).catch(() => {});
      $("pad").toBlob((blob) => store.keep("pad", blob).catch(() => {}));
    }, 200);
  });
  form.addEventListener("change", () => { store.keep("form", form.values()).catch(() => {}); rest(); });
  $("follows").addEventListener("change", () => follow($("follows").value));
  $("controls").addEventListener("submit", (event) => { event.preventDefault(); running && running.kind !== "draft" ? stopped() : draw(); });
  $("live").addEventListener("change", warmUp);
  $("brush").addEventListener("click", () => pick("brush"));
  $("eraser").addEventListener("click", () => pick("eraser"));
  $("size").addEventListener("input", () => { pad.size = Number($("size").value); });
  $("undo").addEventListener("click", () => pad.undo());
  $("redo").addEventListener("click", () => pad.redo());
  $("clear").addEventListener("click", () => { pad.clear(); note("pad-note"); });
  $("upload").addEventListener("click", () => $("file").click());
  // A stroke may start on an example: who moves the pen there draws.
  let pressed = null;
  $("examples").addEventListener("pointerdown", (event) => { pressed = event; });
  $("pad-frame").addEventListener("pointermove", (event) => {
    if (!event.buttons || pressed?.pointerId !== event.pointerId || Math.hypot(event.clientX - pressed.clientX, event.clientY - pressed.clientY) < 6) return;
    pad.begin(pressed, event);
    pressed = null;
  });
  $("file").addEventListener("change", () => { if ($("file").files[0]) bring($("file").files[0]); $("file").value = ""; });
  $("theme").addEventListener("click", theme);
  $("help").addEventListener("click", () => $("sheet").showModal());
  document.addEventListener("keydown", keydown);
  document.addEventListener("paste", (event) => { const file = event.clipboardData?.files[0]; if (file) bring(file); });
  document.addEventListener("dragover", () => { $("pad-frame").classList.add("dragging"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) $("pad-frame").classList.remove("dragging"); });
  document.addEventListener("drop", (event) => {
    $("pad-frame").classList.remove("dragging");
    if (event.dataTransfer.files[0]) bring(event.dataTransfer.files[0]);
  });
  $("plans").addEventListener("change", () => use(capabilities.plans.find((one) => one.name === $("plans").value)));
}

let capabilities = null;

function use(chosen) {
  plan = chosen;
  $("plans").value = plan.name;
  form.build(plan);
  $("follows").replaceChildren(...plan.controls.map(({ type }) => make("option", { value: type }, KINDS[type] ?? type)));
  $("follows-field").hidden = plan.controls.length < 2;
  pad.ground = null; // so that it is made anew
  follow(plan.controls[0]?.type);
  const buttons = examples().map(([name, label, type]) => make("button", { type: "button", "aria-label": `Draw the example ${name}`, onclick: () => example(name, label, type) }, make("img", { src: `studio/${name}.png`, alt: "", draggable: "false" })));
  $("examples").replaceChildren(...buttons);
  stage.build(plan);
  showBackend();
}

const controlsOf = (type) => plan.controls.find((one) => one.type === type);

// The kind of map that is on the pad; one of another ground or ink begins with an empty pad.
function follow(type) {
  const chosen = controlsOf(type) ?? plan.controls[0];
  $("follows").value = chosen?.type ?? "";
  const convention = chosen?.convention;
  const ground = convention ? `rgb(${convention.ground})` : "#000";
  const ink = convention?.polarity === "dark-on-light" ? "#000" : "#fff";
  if (pad.ground === ground && pad.ink === ink) return;
  restored = false;
  pad.reset({ side: plan.image_size * Math.max(1, Math.round(512 / plan.image_size)), ink, ground });
}

function showBackend() {
  $("plan").textContent = [plan.name, `${plan.image_size} px`, plan.backend?.name].filter(Boolean).join(" · ");
  $("plan").title = plan.backend?.why ?? "";
}

// While nothing can be drawn yet, nothing can be set, drawn or dropped that would be lost then.
function wait(on) {
  for (const part of document.querySelectorAll("#controls > :not(.go), .panel, .history")) part.inert = on;
  $("draw").disabled = on;
}

async function start() {
  wait(true);
  for (const type of ["dragover", "drop"]) document.addEventListener(type, (event) => event.preventDefault());
  if (store.local.theme) document.documentElement.dataset.theme = store.local.theme;
  $("keys").append(...KEYS.flatMap(([what, keys]) => [make("dt", {}, ...keys.map((key) => make("kbd", {}, key.length === 1 ? key.toUpperCase() : key))), make("dd", {}, what)]));
  client.addEventListener?.("progress", ({ detail }) => {
    stage.busy(detail);
    note("message", `Loading the model: ${Math.round(100 * detail)} %`);
  });
  client.addEventListener?.("backend", ({ detail }) => {
    plan.backend = detail;
    showBackend();
  });
  try {
    capabilities = await client.capabilities();
    note("message");
    stage.busy(null);
  } catch (error) {
    note("message", sentence(error.message), "bad", ["Try again", () => location.reload()]);
    return;
  }
  $("plans").replaceChildren(...capabilities.plans.map((one) => make("option", { value: one.name }, one.name)));
  $("plans-field").hidden = capabilities.plans.length < 2;
  use(capabilities.plans.find((one) => one.name === capabilities.default_plan));
  listen();
  await store.open();
  results = await store.list();
  const [drawing, kind, settings] = [await store.kept("pad"), await store.kept("follows"), await store.kept("form")];
  if (kind) follow(kind);
  if (settings) form.set({ cfg_scales: "", control_scales: "", class: "", ...settings });
  if (drawing) {
    const image = await createImageBitmap(drawing);
    pad.context.drawImage(image, 0, 0, $("pad").width, $("pad").height);
    restored = !pad.blank;
  }
  if (results[0]) stage.show(results[0]);
  history();
  padChanged();
  form.refresh();
  wait(false);
  document.documentElement.dataset.ready = "";
}

start();
