// The fields of a request checked against a plan, as car_runtime.request and the server do: {seed, label, cfg, …}.

import { photoWarning, prepareControl } from "./checks.js";
import { picture, Refused } from "./codec.js";
import { derive } from "./controls.js";
import { opened } from "./edits.js";

// form: as POST /v1/pictures takes it. results: Map of earlier ones by id.
export async function resolve(plan, form, results) {
  const { model, manifest } = plan;
  const K = plan.scales.length;
  if (form.plan !== undefined && form.plan !== manifest.name) throw new Refused(`there is no plan '${form.plan}' here; this page has ${manifest.name}`, { status: 404, code: "no_plan" });
  if (form.more_smooth) throw new Refused("more_smooth is not available in a page; draw with car-run");
  const defaults = manifest.sampling;
  const n = whole("n", form.n ?? 1, 1, 64);
  const seed = whole("seed", form.seed ?? crypto.getRandomValues(new Uint32Array(1))[0] >>> 1, 0, Number.MAX_SAFE_INTEGER + 1 - n);
  const label = labelOf(plan, form.class);
  const cfg = number("cfg", form.cfg ?? defaults.cfg, 0, 1000);
  const topK = whole("top_k", form.top_k ?? Math.min(defaults.top_k, model.vocab), 0, model.vocab);
  const topP = number("top_p", form.top_p ?? defaults.top_p, 0, 1);
  const drawn = 1 + whole("stop_after", form.stop_after ?? K - 1, 0, K - 1);
  const cfgScales = scalesOf("cfg_scales", form.cfg_scales, K);
  const edit = form.edit ? await opened(plan, form.edit, results) : null;
  const { controls, warnings } = await controlsOf(plan, form, edit);
  return {
    n, seed, label, cfg, top_k: topK || model.vocab, top_p: topP < 1 ? topP : 0, drawn, cfgScales, edit, controls, warnings,
    classless: label === model.classes,
    guided: cfg > 0 && cfgScales[0] < drawn && label !== model.classes,
    controlScales: scalesOf("control_scales", form.control_scales, K),
    controlStrength: number("control_strength", form.control_strength ?? 1, 0, 2),
    previews: form.previews ?? true,
    known: edit?.known ?? null,
    knownMask: edit?.mask ?? null,
  };
}

// {control, type, size, warnings} of a form with photo or control, in base64.
export async function controlMap(plan, form) {
  if (!plan.branches.length) throw new Refused("this plan follows no control; draw without one");
  const given = named(plan, form.photo ?? form.control);
  const [branch] = Object.keys(given);
  const { convention } = plan.about.controls.find(({ type }) => type === branch);
  const size = plan.model.image_size;
  const source = await picture(given[branch], form.photo ? "photo" : "control");
  const { map, said } = form.photo ? derivedOf(source, convention, size, form.fit) : { map: source, said: [] };
  const { square, warnings } = prepareControl(map, convention, size, form.fit);
  if (!form.invert) return { square, type: branch, size, warnings: [...said, ...warnings] };
  const turned = { ...square, data: square.data.map((value) => 255 - value) };
  return { square: turned, type: branch, size, warnings: prepareControl(turned, convention, size).warnings };
}

function derivedOf(photo, convention, size, fit) {
  try {
    const { map, warnings } = derive(photo, convention, size, fit);
    return { map, said: [photoWarning(photo, size, fit ?? convention.fit), ...warnings].filter(Boolean) };
  } catch (error) {
    throw new Refused(error.message);
  }
}

// Branch → image in base64 of what is given, {branch: image} or an image for the default branch.
function named(plan, given) {
  const found = typeof given === "string" ? { [plan.model.default_branch]: given } : given;
  if (Object.keys(found).length && !plan.branches.length) throw new Refused(`the plan '${plan.manifest.name}' has no control branch (plain VAR); leave the control image out`);
  for (const name of Object.keys(found)) if (!plan.branches.includes(name)) throw new Refused(`there is no branch '${name}' here; the page has ${plan.branches.join(", ")} of the plan '${plan.manifest.name}'`);
  return found;
}

// [{branch, weight, image, ...}] in the order of the plan's branches.
async function controlsOf(plan, form, edit) {
  const given = named(plan, form.photo ?? form.control ?? {});
  const [controls, warnings] = [[], []];
  for (const branch of plan.branches.filter((name) => name in given)) {
    const { convention } = plan.about.controls.find(({ type }) => type === branch);
    const size = plan.model.image_size;
    let source = await picture(given[branch], form.photo ? "photo" : "control");
    if (form.photo) {
      const { map, said } = derivedOf(source, convention, size, form.fit);
      source = map;
      warnings.push(...said);
    }
    if (edit && !edit.whole) source = edit.frame.cutAlike(source, convention?.ground ?? [0, 0, 0]);
    const { square, warnings: found } = prepareControl(source, convention, size, form.fit);
    controls.push({ branch, weight: 1, image: square });
    warnings.push(...found);
  }
  return { controls, warnings };
}

// By index or by name, in any case; one of a name's comma-separated synonyms will do.
function labelOf(plan, given) {
  const { classes } = plan.about;
  if (given === undefined || given === null) return plan.model.classes;
  if (typeof given === "number") return whole("class", given, 0, plan.model.classes - 1);
  const wanted = given.trim();
  const key = wanted.toLowerCase();
  const synonyms = (name) => name.split(",").map((part) => part.trim());
  const ways = [(name) => name === wanted, (name) => name.toLowerCase() === key, (name) => synonyms(name).includes(wanted), (name) => synonyms(name).some((part) => part.toLowerCase() === key)];
  for (const way of ways) {
    const found = classes.flatMap((name, i) => (way(name) ? [i] : []));
    if (found.length > 1) throw new Refused(`class '${given}' means any of ${found.join(", ")}; give one of these indices`);
    if (found.length) return found[0];
  }
  if (/^\d{1,9}$/.test(wanted)) return whole("class", Number(wanted), 0, plan.model.classes - 1);
  throw new Refused(`there is no class '${given}'; choose one of the list`);
}

// First scale, and the one after the last: "2-5", "2-", "-5", "3", 3.
export function scalesOf(name, given, K) {
  if (given === undefined || given === null) return [0, K];
  const ends = /^\s*(\d{0,9})\s*(-?)\s*(\d{0,9})\s*$/.exec(String(given));
  if (!ends || (!ends[1] && !ends[3]) || (!ends[2] && ends[3])) throw new Refused(`${name} is '${given}', which names no scales; give two ends as 0-${K - 1}, one of them as 1- or -${K - 1}, or one scale`);
  const first = ends[1] ? Number(ends[1]) : 0;
  const last = ends[2] ? (ends[3] ? Number(ends[3]) : K - 1) : first;
  for (const end of [first, last]) if (end >= K) throw new Refused(`${name} is '${given}', but the plan's scales are 0…${K - 1}; give two of them`);
  if (first > last) throw new Refused(`${name} is '${given}', which ends before it begins; give the coarser scale first`);
  return [first, last + 1];
}

function whole(name, value, low, high) {
  if (!Number.isInteger(value) || value < low || value > high) throw new Refused(`${name} is ${value}, but must be a whole number in ${low}…${high}`);
  return value;
}

function number(name, value, low, high) {
  if (typeof value !== "number" || !(value >= low && value <= high)) throw new Refused(`${name} is ${value}, but must be a number in ${low}…${high}`);
  return value;
}
