"use strict"
{ // Takes the place of the page's WebSocket: the same messages, but a worker answers them.

const $ = id => document.getElementById(id)
const FRAME_BYTES = 4 + 2 * 1920
const facts = JSON.parse($("facts-of-model").textContent)
let worker = null // a promise; it outlives conversations: the model is loaded once

globalThis.LocalSocket = class {
  static seed // of the next conversations; without one each has its own

  constructor() {
    this.readyState = WebSocket.CONNECTING
    this.waiting = 0 // frames that the worker has not answered yet
    const lost = (why = "its program was not loaded") =>
      this.fail(`The model does not run in this browser: ${why}.`)
    worker ??= start()
    worker.then(started => {
      started.onmessage = ({ data }) => this.receive(data)
      started.onerror = event => {
        event.preventDefault()
        lost(event.message || undefined)
      }
    }).catch(error => lost(error.message))
    tell({ begin: LocalSocket.seed })
  }
  get bufferedAmount() { return this.waiting * FRAME_BYTES }
  receive(data) {
    if (this.readyState === WebSocket.CLOSED) return
    if (data.failed) return this.fail(data.failed)
    if (data.total) return this.progress(data)
    if (data instanceof ArrayBuffer) this.waiting--
    else if (JSON.parse(data).type === "begin") {
      this.readyState = WebSocket.OPEN
      this.waiting = 0
      bar.hidden = true
    }
    this.onmessage({ data })
  }
  progress({ loaded, total }) {
    Object.assign(bar, { hidden: false, max: total, value: loaded })
    $("floor").textContent = `Loading: ${Math.floor(100 * loaded / total)}%.`
  }
  fail(reason) {
    if (this.readyState === WebSocket.CLOSED) return
    worker.then(started => started.terminate(), () => {})
    worker = null
    this.close()
    this.onclose({ code: 4000, reason })
  }
  send(data) {
    if (data instanceof DataView) {
      this.waiting++
      tell(data.buffer, [data.buffer])
      return
    }
    const { type, text } = JSON.parse(data)
    tell(type === "type" ? { type: text } : { begin: LocalSocket.seed })
  }
  close() {
    this.readyState = WebSocket.CLOSED
    bar.hidden = true
  }
}

function tell(message, transfer = []) { // one after another: the worker is a promise
  worker.then(started => started.postMessage(message, transfer), () => {})
}

// The worker and its runtime come from blobs, which inherit the page's content security policy. The page asks
// for them, not the worker: without a network Firefox's service worker answers a page, but no blob's worker.
async function start() {
  const blob = async name => {
    const answer = await fetch(name).catch(() => {})
    if (!answer?.ok) throw Error(`${name} was not loaded`)
    return URL.createObjectURL(new Blob([await answer.text()], { type: "text/javascript" }))
  }
  const cache = await globalThis.caches?.open("nanoflm").catch(() => null)
  cache?.addAll(facts.recordings).catch(() => {}) // for without a network
  const started = new Worker(await blob("worker.js"), { type: "module" })
  const runtime = await blob("ort.wasm.bundle.min.mjs")
  started.postMessage({ facts: { ...facts, runtime, folder: new URL(".", location).href } })
  return started
}

async function play(name) { // a request in the microphone's place
  const answer = await fetch(name).catch(() => {})
  if ($("talk").disabled) return // a conversation is just beginning
  if (talk) end("")
  if (answer?.ok) begin(await answer.blob())
  else show("The recording could not be loaded. Is there a network?")
}

const bar = document.createElement("progress")
bar.hidden = true
bar.setAttribute("aria-label", "Loading")
$("floor").after(bar)
if (!facts.toy) $("card").replaceChildren($("card").querySelector("summary"))
$("hint")?.remove() // the page cannot be taught
const note = document.createElement("p")
note.textContent = "The model runs in this page, and nothing that you say leaves it. The first Talk loads "
  + `${(facts.download / 1e6).toFixed(1)} MB (gzip); after that it works without a network.`
if (facts.recordings.length) {
  $("floor").textContent = "Press Talk and say one of the requests below; or press a request, and a "
    + "synthetic voice says it."
  $("card").open = true
}
$("card").append(note)
$("card").hidden = false
for (const [i, line] of $("card").querySelectorAll("dt").entries()) {
  if (!facts.recordings[i]) continue
  const button = document.createElement("button")
  button.textContent = `\u25b8 ${line.textContent}`
  button.onclick = () => play(facts.recordings[i])
  line.replaceChildren(button)
}
navigator.serviceWorker?.register("offline.js").catch(() => {}) // missed only when there is no network
}
