// History and the current drawing, in IndexedDB: a reload loses nothing. Without it (private windows) memory serves.

const KEPT = 200;
let base = null;
// localStorage; where the browser keeps nothing, what is set lasts as long as the page.
export const local = storage();
const memory = { results: new Map(), now: new Map() };

export async function open() {
  base = await new Promise((resolve) => {
    let request;
    try { request = indexedDB.open("car-studio", 1); } catch { resolve(null); return; }
    request.onupgradeneeded = () => {
      request.result.createObjectStore("results", { keyPath: "key" });
      request.result.createObjectStore("now", { keyPath: "key" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => resolve(null);
  });
}

// Newest first.
export async function list() {
  const all = base ? await done(base.transaction("results").objectStore("results").getAll()) : [...memory.results.values()];
  all.sort((a, b) => b.key - a.key);
  for (const old of all.splice(KEPT)) await remove(old.key);
  return all;
}

export const save = (item) => put("results", item);
export const remove = async (key) => (base ? done(base.transaction("results", "readwrite").objectStore("results").delete(key)) : memory.results.delete(key));
export const keep = (key, value) => put("now", { key, value });
export async function kept(key) {
  return (base ? await done(base.transaction("now").objectStore("now").get(key)) : memory.now.get(key))?.value;
}

function storage() {
  try { return localStorage; } catch { return {}; }
}

function put(name, item) {
  if (!base) { memory[name].set(item.key, item); return Promise.resolve(); }
  return done(base.transaction(name, "readwrite").objectStore(name).put(item));
}

function done(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
