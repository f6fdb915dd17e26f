// A result as a command of car-run, as Python, and as curl, with the files that it reads.

import { controlOf, fromBase64 } from "./page.js";

const SAVED = "import base64, json, sys; sys.stdout.buffer.write(base64.b64decode(json.load(sys.stdin)[\"images\"][0][\"png\"]))";

// {words, files: {name: Blob}}; null where what an edit was made from is not known, as of a PNG that was brought.
export function commandOf(kind, result, image, plan, origin) {
  const { receipt } = image;
  if (receipt.edit && !result.edit) return null;
  const files = {};
  if (result.control) files["control.png"] = fromBase64(controlOf(result.control).map, "image/png");
  if (result.edit) files["before.png"] = result.before;
  if (result.edit?.mask) files["mask.png"] = fromBase64(result.edit.mask, "image/png");
  const settings = settingsOf(result, receipt);
  const words = { "car-run": command, Python: python, curl }[kind](result, receipt, settings, plan, origin);
  return { words, files };
}

// What differs from the loop's own defaults, by the names of `generate`.
function settingsOf(result, receipt) {
  const { form } = result;
  const settings = { seed: receipt.seed, cfg: receipt.cfg, top_k: receipt.top_k, top_p: receipt.top_p };
  const label = receipt.class?.name ?? receipt.class?.index;
  if (label !== undefined) settings.class = label;
  for (const name of ["control_strength", "cfg_scales", "control_scales", "stop_after"]) {
    if (form[name] !== undefined && !(name === "control_strength" && form[name] === 1)) settings[name] = form[name];
  }
  return settings;
}

function command(result, receipt, settings, plan) {
  const { edit } = result;
  const words = ["car-run"];
  if (edit?.scale !== undefined) words.push(result.kind === "restyle" ? "restyle" : "vary", "before.png", "--from-scale", edit.scale + 1);
  if (edit?.mask) words.push("paint", "before.png", "--mask", "mask.png");
  if (edit?.frame) words.push("extend", "before.png", ...["left", "top", "right", "bottom"].flatMap((side, i) => [`--${side}`, receipt.edit.extend[i]]));
  if (!plan.shipped) words.push("-e", `${plan.name}.plan`);
  const control = controlOf(result.control);
  if (control) words.push("--control", `${control.type ? `${control.type}=` : ""}control.png`);
  for (const [name, value] of Object.entries(settings)) words.push(`--${name.replaceAll("_", "-")}`, value);
  return [...words, "-o", "image.png"].map(quote).join(" ");
}

function python(result, receipt, settings, plan) {
  const { edit } = result;
  const { class: label, ...rest } = settings;
  const given = Object.entries({ ...(label === undefined ? {} : { label }), ...rest }).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  const lines = ["import car_runtime", "from PIL import Image"];
  const inside = [];
  if (edit) {
    lines.push("from car_runtime.editing.edit import Edit");
    const how = ['image="before.png"'];
    if (edit.scale !== undefined) {
      lines.push("from car_runtime.images import text_chunks", "from car_runtime.receipt import receipt_of");
      inside.push('tokens = receipt_of(text_chunks("before.png"), plan.manifest).tokens');
      how.push(`from_scale=${edit.scale + 1}`, "tokens=tokens");
    }
    if (edit.mask) how.push('mask="mask.png"');
    if (edit.frame) how.push(`extend=(${receipt.edit.extend.join(", ")})`);
    given.push(`edit=Edit(${how.join(", ")})`);
  }
  const control = controlOf(result.control);
  if (control) given.unshift(control.type ? `{${JSON.stringify(control.type)}: "control.png"}` : '"control.png"');
  inside.push(`result = plan.generate(${given.join(", ")})`);
  inside.push(`Image.fromarray(result.${edit ? "edited" : "images"}[0]).save("image.png")`);
  return [...lines, "", `with car_runtime.open_plan(${plan.shipped ? "" : JSON.stringify(`${plan.name}.plan`)}) as plan:`, ...inside.map((line) => `    ${line}`)].join("\n");
}

function curl(result, receipt, settings, plan, origin) {
  const words = ["curl -s", `${origin}/v1/pictures`];
  const field = (name, value) => words.push(`--form-string ${quote(`${name}=${value}`)}`);
  for (const [name, value] of Object.entries({ plan: plan.name, ...settings })) field(name, value);
  const control = controlOf(result.control);
  if (control) words.push(`-F control${control.type ? `.${control.type}` : ""}=@control.png`);
  const { mask, ...edit } = result.edit ?? {};
  if (result.edit) words.push("-F edit.image=@before.png");
  if (Object.keys(edit).length) field("edit", JSON.stringify(edit));
  if (mask) words.push("-F edit.mask=@mask.png");
  return `${words.join(" \\\n  ")} |\n  python3 -c '${SAVED}' > image.png`;
}

const quote = (value) => (/^[\w.:/=-]+$/.test(String(value)) ? String(value) : `'${String(value).replaceAll("'", "'\\''")}'`);
