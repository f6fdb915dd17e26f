// The service worker of a site of `car-run plan web`, which puts VERSION and PAGE before it: files are kept, so that the page works
// offline, and carry the headers that threads of WebAssembly need. A site that was made anew has another VERSION.

/* global VERSION, PAGE */

// An origin may have more than one site, each in its folder.
const SITE = `car ${self.registration.scope} `;
const NAME = SITE + VERSION;
const HEADERS = {
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "Cross-Origin-Resource-Policy": "same-origin",
  "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'self'",
};

// It waits while an older one answers for an open page, whose files must stay those of one site, until the page says "take".
self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(PAGE.map((path) => new Request(path, { cache: "no-cache" })))));
});

self.addEventListener("activate", (event) => {
  const old = (name) => name.startsWith(SITE) && name !== NAME;
  event.waitUntil(caches.keys().then((names) => Promise.all(names.filter(old).map((name) => caches.delete(name)))).then(() => self.clients.claim()));
});

self.addEventListener("message", (event) => {
  if (event.data === "take") self.skipWaiting();
  if (event.data === "claim") event.waitUntil(self.clients.claim());
});

self.addEventListener("fetch", (event) => {
  const { method, url } = event.request;
  if (method === "GET" && url.startsWith(self.registration.scope)) event.respondWith(answer(event));
});

async function answer(event) {
  const { scope } = self.registration;
  const address = event.request.url.split(/[?#]/)[0];
  const path = address === `${scope}index.html` ? scope : address;
  const cache = await caches.open(NAME);
  let found = await cache.match(path);
  if (!found) {
    found = await fetch(event.request, { cache: "no-cache" }); // that the browser kept may be of an older site
    if (found.ok) event.waitUntil(cache.put(path, found.clone()));
  }
  const headers = new Headers(found.headers);
  for (const [name, value] of Object.entries(HEADERS)) headers.set(name, value);
  return new Response(found.body, { status: found.status, statusText: found.statusText, headers });
}
