// The right square: images as they arrive, the filmstrip of scales, and the tools for what is there.
//
// A result: {key, id, form, control: as a form has it, images: [{seed, png, receipt, scales: [Blob]}], before, live}.

import { $, button, icon, make, set, text, url } from "./page.js";
import { Paper } from "./paper.js";

export class Stage {
  result = null;
  image = 0;
  scale = null; // pinned
  mode = "view"; // view, mask, extend, compare, copy
  frame = [0.2, 0.2, 0.8, 0.8];
  #hover = null;

  // act: {branch, restyle, stop, paint, extend, remix, download, copy}
  constructor(act) {
    this.act = act;
    this.mask = new Paper($("mask"), { ink: "#5c7cfa", ground: null });
    this.mask.size = 64;
    $("slider").addEventListener("input", () => $("compare").style.setProperty("--at", `${$("slider").value}%`));
    $("film").addEventListener("keydown", (event) => this.#keys(event));
    this.#grip();
  }

  build(plan) {
    this.sides = plan.scales;
    this.encoder = plan.has_encoder;
    this.commands = plan.commands ?? ["car-run", "Python", "curl"];
    this.render();
  }

  // Show a result, or one that is being drawn and has fewer images and scales yet.
  show(result, { keepScale = false } = {}) {
    if (result !== this.result) {
      this.image = Math.min(result?.selected ?? 0, (result?.images.length ?? 1) - 1);
      if (!keepScale) this.scale = null;
      if (this.mode !== "view") this.setMode("view");
    }
    this.result = result;
    this.render();
  }

  get current() { return this.result?.images[this.image]; }

  setMode(mode) {
    this.mode = mode;
    $("mask").hidden = mode !== "mask";
    $("extend").hidden = mode !== "extend";
    $("compare").hidden = mode !== "compare";
    if (mode === "mask") this.mask.reset({ side: $("mask").width, ink: "#5c7cfa", ground: null });
    if (mode === "extend") this.#place();
    if (mode === "compare") $("before").src = url(this.result.before);
    if (mode !== "view") this.scale = null;
    this.render();
    if (mode !== "view") $("actions").querySelector("button")?.focus({ preventScroll: true });
  }

  pin(scale) {
    this.scale = scale;
    this.render();
  }

  busy(share) {
    $("progress").hidden = share === null;
    if (share !== null) $("progress").firstElementChild.style.transform = `scaleX(${share})`;
  }

  render() {
    this.#images();
    this.#film();
    this.#actions();
  }

  #images() {
    const box = $("images");
    const images = this.result?.images ?? [];
    const alone = this.mode === "mask" || this.mode === "extend"; // these are about one image
    box.dataset.n = alone ? 1 : images.length > 4 ? 9 : images.length > 1 ? 4 : 1;
    while (box.children.length > images.length) box.lastChild.remove();
    while (box.children.length < images.length) {
      const index = box.children.length;
      box.append(make("button", { type: "button", onclick: () => this.#select(index) }, make("img", { alt: "" })));
    }
    images.forEach((image, i) => {
      const cell = box.children[i];
      set(cell, "hidden", alone && i !== this.image);
      const shown = this.#blob(image, i === this.image ? this.#hover ?? this.scale : this.scale);
      set(cell, "aria-pressed", String(i === this.image));
      set(cell, "aria-label", `Image ${i + 1} of ${images.length}, seed ${image.seed}`);
      const img = cell.firstChild;
      set(img, "hidden", !shown);
      if (shown) set(img, "src", url(shown));
    });
  }

  #blob(image, scale) {
    if (scale !== null && image.scales[scale]) return image.scales[scale];
    return image.png ?? image.scales.findLast(Boolean) ?? image.old;
  }

  #select(index) {
    this.image = index;
    if (this.result) this.result.selected = index;
    this.render();
  }

  #film() {
    const film = $("film");
    const sides = this.sides ?? [];
    if (film.children.length !== sides.length) {
      film.replaceChildren(...sides.map((side, i) => make("li", {},
        make("button", { type: "button", tabindex: i ? "-1" : "0", title: `${side} × ${side}`, "aria-label": `Scale ${i + 1} of ${sides.length}, ${side} × ${side} tokens`, onclick: () => this.pin(this.scale === i ? null : i) }),
        make("button", { type: "button", class: "fork", hidden: i === sides.length - 1, tabindex: "-1", "aria-label": `Branch at scale ${i + 1}`, title: "Branch here: keep the coarse scales, draw the fine ones anew", onclick: () => this.act.branch(i) }, icon("branch")))));
      [...film.children].forEach((item, i) => {
        item.addEventListener("pointerenter", () => this.#peek(i));
        item.addEventListener("pointerleave", () => this.#peek(null));
      });
    }
    const image = this.current;
    [...film.children].forEach((item, i) => {
      const [cell, fork] = item.children;
      const blob = image?.scales[i];
      set(cell, "disabled", !blob);
      set(cell, "aria-pressed", String(this.scale === i));
      set(fork, "disabled", !blob || !this.result.id);
      const img = cell.querySelector("img");
      if (blob && img) set(img, "src", url(blob));
      else if (blob) cell.replaceChildren(make("img", { src: url(blob), alt: "" }));
      else if (img || !cell.textContent) cell.replaceChildren(String(sides[i]));
    });
  }

  #peek(scale) {
    this.#hover = scale !== null && this.current?.scales[scale] ? scale : null;
    this.#images();
  }

  #keys(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1, Home: -99, End: 99 }[event.key];
    if (!step) return;
    event.preventDefault();
    const cells = [...$("film").children].map((item) => item.firstChild);
    const at = Math.max(0, cells.indexOf(document.activeElement));
    const to = Math.min(cells.length - 1, Math.max(0, at + step));
    cells.forEach((cell, i) => cell.setAttribute("tabindex", i === to ? 0 : -1));
    cells[to].focus();
    if (!cells[to].disabled) this.pin(to);
  }

  // Built anew only when they change: in live mode this is asked ten times a second.
  #actions() {
    const bar = $("actions");
    const { current, scale } = this;
    const state = [this.mode, this.mask.tool, Boolean(current?.png), scale !== null && current?.scales[scale] ? scale : -1, Boolean(this.result?.before), this.encoder, this.sides?.length].join();
    if (bar.dataset.state === state) return;
    bar.dataset.state = state;
    const focused = bar.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") ?? document.activeElement.textContent : null;
    bar.replaceChildren(...this.#tools());
    if (focused) [...bar.querySelectorAll("button")].find((b) => (b.getAttribute("aria-label") ?? b.textContent) === focused)?.focus({ preventScroll: true });
  }

  #tools() {
    const done = Boolean(this.current?.png);
    const close = button("close", "Back (Esc)", () => this.setMode("view"));
    const gap = make("span", { class: "gap" });
    if (this.mode === "mask") {
      const size = make("input", { type: "range", min: 16, max: 160, value: this.mask.size, "aria-label": "Mask brush size" });
      const fill = () => size.style.setProperty("--at", `${(100 * (size.value - size.min)) / (size.max - size.min)}%`);
      size.addEventListener("input", () => { this.mask.size = Number(size.value); fill(); });
      fill();
      const tool = (name, label) => button(name, label, () => { this.mask.tool = name; this.render(); }, { "aria-pressed": String(this.mask.tool === name) });
      return [tool("brush", "Mask brush"), tool("eraser", "Mask eraser"), size, gap, text("In-paint", () => this.act.paint(), true), close];
    }
    if (this.mode === "extend") return [make("span", { class: "note" }, "Drag the corner"), gap, text("Extend", () => this.act.extend(), true), close];
    if (this.mode === "compare") return [make("span", { class: "note" }, "Before, after"), gap, close];
    if (this.mode === "copy") return [...this.commands.map((kind) => text(kind, () => this.act.copy(kind))), gap, close];
    if (this.scale !== null && this.current?.scales[this.scale]) {
      const last = this.scale === this.sides.length - 1;
      return [
        make("span", { class: "note which" }, `Scale ${this.scale + 1} of ${this.sides.length}`), gap,
        ...(last ? [] : [text("Stop here", () => this.act.stop(this.scale)), text("Branch here", () => this.act.branch(this.scale), true), text("Restyle", () => this.act.restyle(this.scale))]),
        button("close", "All scales (Esc)", () => this.pin(null)),
      ];
    }
    const off = { disabled: !done };
    return [
      button("mask", "In-paint (M)", () => this.setMode("mask"), { disabled: !done || !this.encoder }),
      button("extend", "Extend (X)", () => this.setMode("extend"), { disabled: !done || !this.encoder }),
      button("compare", "Before and after (C)", () => this.setMode("compare"), { disabled: !done || !this.result?.before }),
      gap,
      button("remix", "Remix: these settings, another seed", () => this.act.remix(), off),
      button("copy", "Copy as a command", () => this.setMode("copy"), off),
      button("download", "Download (D)", () => this.act.download(), off),
    ];
  }

  // The frame of `extend`: its corner is dragged, its middle stays.
  #grip() {
    const set = (share) => {
      const half = Math.min(0.46, Math.max(0.17, share));
      this.frame = [0.5 - half, 0.5 - half, 0.5 + half, 0.5 + half];
      this.#place();
    };
    $("grip").addEventListener("pointerdown", (event) => $("grip").setPointerCapture(event.pointerId));
    $("grip").addEventListener("pointermove", (event) => {
      if (!$("grip").hasPointerCapture(event.pointerId)) return;
      const box = $("extend").getBoundingClientRect();
      set(Math.max((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height) - 0.5);
    });
    $("grip").addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
      if (!step) return;
      event.preventDefault();
      set(this.frame[2] - 0.5 + step * 0.02);
    });
  }

  async #place() {
    const [left, top, right, bottom] = this.frame;
    $("grip").style.left = `${100 * right}%`;
    $("grip").style.top = `${100 * bottom}%`;
    const image = await createImageBitmap(this.current.png);
    const canvas = $("placed");
    const side = canvas.width;
    const context = canvas.getContext("2d");
    context.clearRect(0, 0, side, side);
    context.drawImage(image, left * side, top * side, (right - left) * side, (bottom - top) * side);
  }
}
