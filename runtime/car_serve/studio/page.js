// Small helpers for the page.

export const $ = (id) => document.getElementById(id);

export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// An attribute, touched only where it changes; true and false: there or not.
export function set(node, name, value) {
  if (typeof value === "boolean") { if (node.hasAttribute(name) !== value) node.toggleAttribute(name, value); }
  else if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `studio/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

export const button = (name, label, onclick, extra = {}) =>
  make("button", { type: "button", class: "icon", "aria-label": label, title: label, onclick, ...extra }, icon(name));

export const text = (label, onclick, strong = false) => make("button", { type: "button", class: strong ? "quiet strong" : "quiet", onclick }, label);

// A line under what it is about; `way` is [label, action], the way out.
export function note(id, words = "", kind = "", way = null) {
  const node = $(id);
  node.className = `note ${id.endsWith("note") && id !== "class-note" ? "line" : ""} ${kind}`.trim();
  node.replaceChildren(words, ...(way ? [" ", make("button", { type: "button", onclick: way[1] }, way[0])] : []));
}

// Of a form's control: the branch that it names, null for the plan's default, and the map, a PNG in base64.
export function controlOf(control) {
  if (!control) return null;
  const [type, map] = typeof control === "string" ? [null, control] : Object.entries(control)[0];
  return { type, map };
}

export function fromBase64(data, type) {
  const text = atob(data);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
  return new Blob([bytes], { type });
}

export async function toBase64(blob) {
  const url = await new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
  return url.slice(url.indexOf(",") + 1);
}

// One object URL for each blob. An address keeps its bytes in the browser, so that it is given back when nobody has the
// blob any more: live mode alone makes ten a second.
const urls = new WeakMap();
const gone = new FinalizationRegistry((address) => URL.revokeObjectURL(address));
export function url(blob) {
  if (!urls.has(blob)) {
    urls.set(blob, URL.createObjectURL(blob));
    gone.register(blob, urls.get(blob));
  }
  return urls.get(blob);
}

export function save(blob, name) {
  const link = make("a", { href: url(blob), download: name });
  link.click();
}

export const sentence = (words) => words.charAt(0).toUpperCase() + words.slice(1).replace(/([^.!?])$/, "$1.");
