"use strict"
{ // Takes the place of the page's WebSocket: the same messages, but a worker answers them.

const $ = id => document.getElementById(id)
const FRAME_BYTES = 4 + 2 * 1920
const facts = JSON.parse($("facts-of-model").textContent)
let worker = null // outlives conversations: the model is loaded once

globalThis.LocalSocket = class {
  static seed // of the next conversations; without one each has its own

  constructor() {
    this.readyState = WebSocket.CONNECTING
    this.waiting = 0 // frames that the worker has not answered yet
    worker ??= start()
    worker.onmessage = ({ data }) => this.receive(data)
    worker.onerror = event => {
      event.preventDefault()
      this.fail(`The model does not run in this browser: ${event.message || "its program was not loaded"}.`)
    }
    worker.postMessage({ begin: LocalSocket.seed })
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
    worker.terminate()
    worker = null
    this.close()
    this.onclose({ code: 4000, reason })
  }
  send(data) {
    if (data instanceof DataView) {
      this.waiting++
      worker.postMessage(data.buffer, [data.buffer])
      return
    }
    const { type, text } = JSON.parse(data)
    worker.postMessage(type === "type" ? { type: text } : { begin: LocalSocket.seed })
  }
  close() {
    this.readyState = WebSocket.CLOSED
    bar.hidden = true
  }
}

function start() { // through a blob, which inherits the page's content security policy
  const code = `import ${JSON.stringify(new URL("worker.js", location).href)}`
  const url = URL.createObjectURL(new Blob([code], { type: "text/javascript" }))
  const started = new Worker(url, { type: "module" })
  started.postMessage({ facts })
  return started
}

const bar = document.createElement("progress")
bar.hidden = true
bar.setAttribute("aria-label", "Loading")
$("floor").after(bar)
if (!facts.toy) $("card").replaceChildren($("card").querySelector("summary"))
$("hint")?.remove() // the page cannot be taught
const note = document.createElement("p")
note.textContent = `The model runs in this page. The first Talk loads ${(facts.download / 1e6).toFixed(1)} MB; `
  + "after that it works without a network. Nothing that you say is sent anywhere."
$("card").append(note)
$("card").hidden = false
navigator.serviceWorker?.register("offline.js").catch(() => {}) // missed only when there is no network
}
