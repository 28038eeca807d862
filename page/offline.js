// A service worker: without a network the page comes from what was kept of it. (worker.js keeps the model.)
const FILES = ["./", "index.html", "local.js", "worker.js", "ort.wasm.bundle.min.mjs"]
oninstall = event => event.waitUntil(
  caches.open("nanoflm").then(cache => cache.addAll(FILES)).then(() => skipWaiting()))
onactivate = event => event.waitUntil(clients.claim())
onfetch = event => event.respondWith(fetch(event.request).then(async answer => {
  const url = new URL(event.request.url)
  const small = FILES.some(name => new URL(name, location).href === url.href)
  if (small && answer.ok) await (await caches.open("nanoflm")).put(event.request, answer.clone())
  return answer
}).catch(async () => await caches.match(event.request) ?? Response.error()))
