// A result as a command of car-run, as Python, and as curl. The control is the file that comes with it: control.png.

export function commandOf(kind, result, image, origin) {
  const { receipt } = image;
  const settings = settingsOf(result, receipt);
  if (kind === "curl") {
    const body = JSON.stringify({ ...settings, control: "'\"$(base64 -w0 control.png)\"'" });
    return `curl -s ${origin}/v1/pictures -H 'Content-Type: application/json' \\\n  -d '${body}'`;
  }
  if (kind === "Python") {
    const { class: label, plan: _, ...rest } = settings;
    const named = Object.entries({ label, ...rest }).filter(([, value]) => value !== undefined);
    const args = ['"control.png"', ...named.map(([name, value]) => `${name}=${python(value)}`)];
    return `import car_runtime\n\nwith car_runtime.open_plan() as plan:\n    result = plan.generate(${args.join(", ")})`;
  }
  const flags = Object.entries(settings).filter(([name]) => name !== "plan").map(([name, value]) => `--${name.replaceAll("_", "-")} ${quote(value)}`);
  return `car-run --control control.png ${flags.join(" ")} -o image.png`;
}

// What differs from the loop's own defaults, by the names of `generate`.
function settingsOf(result, receipt) {
  const { form } = result;
  const settings = { plan: receipt.plan, seed: receipt.seed, cfg: receipt.cfg, top_k: receipt.top_k, top_p: receipt.top_p };
  const label = receipt.class?.name ?? receipt.class?.index;
  if (label !== undefined) settings.class = label;
  for (const name of ["control_strength", "cfg_scales", "control_scales", "stop_after"]) {
    if (form[name] !== undefined && !(name === "control_strength" && form[name] === 1)) settings[name] = form[name];
  }
  return settings;
}

const python = (value) => (typeof value === "string" ? JSON.stringify(value) : String(value));
const quote = (value) => (/^[\w.:-]+$/.test(String(value)) ? String(value) : `'${String(value).replaceAll("'", "'\\''")}'`);
