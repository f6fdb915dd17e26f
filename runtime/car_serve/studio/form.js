// The column of settings: what it says, what it is set to, and the class search.

import { $, make, note } from "./page.js";

const SLIDERS = ["control_strength", "cfg", "top_k", "top_p"];
const TEXTS = ["cfg_scales", "control_scales"];

export class Form extends EventTarget {
  locked = false;
  #classes = [];
  #ends = {}; // of a slider: its step and its most
  #active = -1;

  constructor() {
    super();
    for (const id of SLIDERS) this.#ends[id] = { step: $(id).step, max: $(id).max };
    for (const id of SLIDERS) $(id).addEventListener("input", () => { $(id).step = this.#ends[id].step; });
    for (const id of [...SLIDERS, "size"]) $(id).addEventListener("input", () => this.#fill(id));
    $("controls").addEventListener("change", () => this.dispatchEvent(new Event("change")));
    $("lock").addEventListener("click", () => this.lock(!this.locked));
    $("dice").addEventListener("click", () => this.roll());
    $("seed").addEventListener("input", () => { $("seed").value = $("seed").value.replace(/\D/g, "").slice(0, 16); this.lock(true); });
    this.#combo();
  }

  // Ranges, defaults and classes of a plan.
  build(plan) {
    this.plan = plan;
    this.#classes = plan.classes;
    const { defaults, ranges } = plan;
    this.#ends.top_k.max = ranges.top_k[1];
    this.set({ ...defaults, top_k: Math.min(defaults.top_k, ranges.top_k[1]) });
  }

  // Whether the class is one of the plan's, or none; says so where it is written.
  check() {
    const name = $("class").value.trim();
    const key = name.toLowerCase();
    const known = this.#classes.some((one) => [one, ...one.split(",")].some((part) => part.trim().toLowerCase() === key));
    const wrong = name && !known && !(/^\d+$/.test(name) && Number(name) < this.#classes.length);
    note("class-note", wrong ? `No class is called “${name}”.` : "", "bad", wrong ? ["Choose one", () => { $("class").focus(); this.#show(""); }] : null);
    $("class").setAttribute("aria-invalid", Boolean(wrong));
    if (wrong) $("class").scrollIntoView({ block: "nearest" });
    return !wrong;
  }

  // As POST /v1/pictures takes them.
  values() {
    const name = $("class").value.trim();
    const values = { plan: this.plan.name, seed: Number($("seed").value || 0), n: Number(document.querySelector("[name=n]:checked").value) };
    if (name) values.class = /^\d+$/.test(name) && !this.#classes.includes(name) ? Number(name) : name;
    for (const id of SLIDERS) values[id] = Number($(id).value);
    if (!this.plan.controls.length) delete values.control_strength;
    for (const id of TEXTS) if ($(id).value.trim()) values[id] = $(id).value.trim();
    return values;
  }

  set(values) {
    for (const id of SLIDERS) if (values[id] !== undefined) this.#slide(id, Number(values[id]));
    for (const id of SLIDERS) this.#fill(id);
    for (const id of TEXTS) if (id in values) $(id).value = values[id] ?? "";
    if (values.seed !== undefined) $("seed").value = values.seed;
    if ("class" in values) $("class").value = values.class?.name ?? values.class?.index ?? values.class ?? "";
    const n = document.querySelector(`[name=n][value="${values.n}"]`);
    if (n) n.checked = true;
  }

  // To the value itself, also where a slider has no step, or ends before it, as a receipt may hold any that can be drawn with.
  #slide(id, value) {
    const { step, max } = this.#ends[id];
    const [least, most] = this.plan.ranges[id];
    Object.assign($(id), { step: "any", max: Math.max(max, Math.min(value, most) || least), value });
    if (Number(max) === Number($(id).max) && onStep(value, step)) $(id).step = step;
  }

  lock(on) {
    this.locked = on;
    $("lock").setAttribute("aria-pressed", on);
    $("lock").querySelector("use").setAttribute("href", `studio/icons.svg#${on ? "lock" : "unlock"}`);
  }

  // A seed for what must differ from what there is; a locked one stays in its field for the next drawing.
  another() {
    if (this.locked) return random();
    this.roll();
    return Number($("seed").value);
  }

  roll() {
    $("seed").value = random();
    this.dispatchEvent(new Event("change"));
  }

  refresh() { for (const id of [...SLIDERS, "size"]) this.#fill(id); }

  #fill(id) {
    const input = $(id);
    input.style.setProperty("--at", `${(100 * (input.value - input.min)) / (input.max - input.min)}%`);
    const out = document.querySelector(`output[for="${id}"]`);
    if (out) out.value = Number(input.value) === 0 && id !== "control_strength" ? "off" : input.value;
  }

  #combo() {
    const input = $("class");
    input.addEventListener("input", () => { note("class-note"); input.setAttribute("aria-invalid", "false"); this.#show(input.value); });
    input.addEventListener("click", () => this.#show(""));
    input.addEventListener("blur", () => this.#hide());
    input.addEventListener("keydown", (event) => {
      const items = [...$("classes").children];
      if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        event.preventDefault();
        if ($("classes").hidden) this.#show("");
        else this.#point((this.#active + (event.key === "ArrowDown" ? 1 : -1) + items.length) % items.length);
      } else if (event.key === "Enter" && !$("classes").hidden && items[this.#active]) {
        event.preventDefault();
        event.stopPropagation();
        this.#choose(items[this.#active].dataset.name);
      } else if (event.key === "Escape" && !$("classes").hidden) {
        event.stopPropagation();
        this.#hide();
      }
    });
    $("classes").addEventListener("pointerdown", (event) => {
      event.preventDefault();
      const item = event.target.closest("li[data-name]");
      if (item) this.#choose(item.dataset.name);
    });
  }

  #show(text) {
    const words = text.toLowerCase().split(/[\s-]+/).filter(Boolean);
    const found = this.#classes.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
    const items = [["", "Any class"], ...found.slice(0, 100).map((name) => [name, name])];
    $("classes").replaceChildren(...(words.length ? items.slice(1) : items).map(([name, label], i) => make("li", { role: "option", id: `class-${i}`, "aria-selected": "false", "data-name": name }, label)));
    if (!$("classes").children.length) $("classes").append(make("li", { role: "option", "aria-disabled": "true", "aria-selected": "false" }, "No such class"));
    $("classes").hidden = false;
    $("class").setAttribute("aria-expanded", "true");
    this.#point(words.length ? 0 : -1);
  }

  #point(index) {
    this.#active = index;
    [...$("classes").children].forEach((item, i) => item.setAttribute("aria-selected", i === index));
    const item = $("classes").children[index];
    if (item) { $("class").setAttribute("aria-activedescendant", item.id); item.scrollIntoView({ block: "nearest" }); }
    else $("class").removeAttribute("aria-activedescendant");
  }

  #choose(name) {
    $("class").value = name;
    this.check();
    this.#hide();
    this.dispatchEvent(new Event("change"));
  }

  #hide() {
    $("classes").hidden = true;
    $("class").setAttribute("aria-expanded", "false");
    $("class").removeAttribute("aria-activedescendant");
  }
}

const onStep = (value, step) => Math.abs(value / step - Math.round(value / step)) < 1e-6;

const random = () => crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
