// The engine of the page: what live/web.py does on a server, in a worker of the browser.
//
//   {facts}                                        -->  loads model and runtime; {loaded, total} as they come
//   {begin: seed}, or text {"type": "restart"}     -->  a new conversation
//   {type: text}                                   -->  what the user types
//   binary: number of the frame, 1920 samples      -->  one run of the graph
//   text: {"type": "text", "time": 1.2, "text": " seven"}, {"type": "begin"}  <--
//   binary: number of the frame heard, 1920 said                              <--
//   {failed: a sentence}                                                      <--

const FRAME = 1920, SECONDS = 0.08
let facts, ort, session, state, seed, frames, utf8, typed

let last = Promise.resolve() // messages are handled one after another
onmessage = ({ data }) => {
  last = last.then(() => handle(data)).catch(error => postMessage({ failed: explain(error) }))
}

async function handle(data) {
  if (data.facts) await load(data.facts)
  else if (data instanceof ArrayBuffer) await step(data)
  else if ("type" in data) typed = typed.length ? typed : tokensOf(data.type)
  else begin(data.begin ?? crypto.getRandomValues(new Uint32Array(1))[0])
}

// ---- loading ----

class Sentence extends Error {} // one that the page shows as it is

function explain(error) {
  if (error instanceof Sentence) return error.message
  const text = String(error?.message ?? error)
  if (error instanceof RangeError || /memory|bad_alloc|allocat/i.test(text))
    return "This device has too little free memory for the model. Close other pages, then reload this one."
  return `The model does not run in this browser: ${text.slice(0, 200)}.`
}

async function load(given) {
  if (session) return
  if (typeof WebAssembly !== "object" || !WebAssembly.validate(SIMD))
    throw new Sentence("Here is no WebAssembly with SIMD: the browser is too old, or has it switched off.")
  facts = given
  const parts = Object.entries(facts.files), loaded = parts.map(() => 0)
  const total = parts.reduce((n, [, file]) => n + file.bytes, 0)
  const report = i => n => {
    loaded[i] = n
    postMessage({ loaded: loaded.reduce((a, b) => a + b), total })
  }
  const [model, wasm] = await Promise.all(parts.map(([name, file], i) => get(name, file, report(i))))
  ort = await import(facts.runtime)
  Object.assign(ort.env.wasm, { wasmBinary: wasm.buffer, numThreads: 1 })
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"] })
}

// (module (func (result v128) i32.const 0 i8x16.splat))
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0,
                           10, 8, 1, 6, 0, 65, 0, 253, 15, 11)

async function get(name, { bytes, sha256 }, report) { // kept for the next time, and for without a network
  const url = new URL(`${name}?${sha256}`, facts.folder).href
  const cache = await globalThis.caches?.open("nanoflm").catch(() => null)
  const kept = await cache?.match(url)
  const answer = kept ?? await fetch(url).catch(() => {
    throw new Sentence(`${name} could not be loaded. Is there a network?`)
  })
  if (!answer.ok) throw new Sentence(`${name} could not be loaded: the server answers ${answer.status}.`)
  const data = new Uint8Array(bytes)
  try {
    const body = kept ? kept.body : answer.body.pipeThrough(new DecompressionStream("gzip"))
    const reader = body.getReader()
    for (let at = 0, part; !(part = await reader.read()).done; report(at)) {
      data.set(part.value, at) // RangeError if there is too much
      at += part.value.length
    }
    if (await digest(data) !== sha256) throw Error("its sum is another")
  } catch (error) {
    await cache?.delete(url)
    throw new Sentence(`${name} is cut off or damaged. Reload the page. (${error.message})`)
  }
  if (cache && !kept) {
    for (const { url: old } of await cache.keys())
      if (old.startsWith(url.split("?")[0])) await cache.delete(old)
    await cache.put(url, new Response(data)).catch(() => {}) // there may be no room
  }
  return data
}

async function digest(data) {
  const sum = new Uint8Array(await crypto.subtle.digest("SHA-256", data))
  return Array.from(sum, b => b.toString(16).padStart(2, "0")).join("")
}

// ---- a conversation ----

const ARRAYS = { int64: BigInt64Array, float32: Float32Array, bool: Uint8Array }

function begin(number) {
  seed = BigInt(number)
  frames = 0
  typed = []
  utf8 = new TextDecoder("utf-8", { ignoreBOM: true })
  state = {}
  for (const { name, type, dims, values } of facts.state) {
    const array = new ARRAYS[type](dims.reduce((a, b) => a * b, 1))
    values?.forEach((v, i) => { array[i] = type === "int64" ? BigInt(v) : v })
    state[name] = new ort.Tensor(type, array, dims)
  }
  postMessage('{"type":"begin"}')
}

async function step(data) {
  const heard = new DataView(data)
  const wav = Float32Array.from({ length: FRAME }, (_, i) => heard.getInt16(4 + 2 * i, true) / 32768)
  frames++
  if (typed.length)
    state["state.text"] = new ort.Tensor("int64", BigInt64Array.of(BigInt(typed.shift())), [1])
  const draws = { length: facts.draws }
  const uniforms = Float64Array.from(draws, (_, draw) => uniform(seed, BigInt(frames), BigInt(draw)))
  const out = await session.run({ ...state, wav: new ort.Tensor("float32", wav, [1, 1, FRAME]),
                                  uniforms: new ort.Tensor("float64", uniforms, [1, facts.draws]) })
  for (const { name } of facts.state) state[name] = out[`next.${name}`]
  if (state["state.failed"].data[0])
    throw new Sentence("The model's logits are not numbers; its weights are damaged.")
  const n = heard.getUint32(0, true), text = typed.length ? "" : write(Number(out.text.data[0]))
  const time = Math.round(100 * (n + 1) * SECONDS) / 100
  if (text) postMessage(JSON.stringify({ type: "text", time, text }))
  const said = new DataView(new ArrayBuffer(4 + 2 * FRAME))
  said.setUint32(0, n, true)
  out.said.data.forEach((x, i) => said.setInt16(4 + 2 * i, Math.round(clamp(x) * 32767), true))
  postMessage(said.buffer, [said.buffer])
}

function clamp(x) { return Math.max(-1, Math.min(1, x)) }

function write(token) { // what it adds to the text, as in live/transcript.py
  const bytes = token === facts.wait ? null : facts.tokens[token]
  return bytes ? utf8.decode(Uint8Array.from(atob(bytes), c => c.charCodeAt(0)), { stream: true }) : ""
}

function tokensOf(text) { // layouts/typed.py: typed_tokens(), for a tokeniser of our own
  const ranks = new Map(facts.tokens.map((bytes, i) => [atob(bytes ?? ""), i]))
  for (const special of [facts.wait, facts.asr, facts.answer]) ranks.delete(atob(facts.tokens[special]))
  const words = text.normalize("NFC").split(/\s+/).filter(Boolean)
  return [facts.asr, ...words.flatMap(word => merge(` ${word}`, ranks)), facts.answer]
}

function merge(word, ranks) { // BPE: joins the neighbours that make the first token, as long as any make one
  const parts = Array.from(new TextEncoder().encode(word), byte => String.fromCharCode(byte))
  for (;;) {
    const joined = parts.slice(1).map((part, i) => ranks.get(parts[i] + part) ?? Infinity)
    const first = Math.min(...joined), at = joined.indexOf(first)
    if (first === Infinity) return parts.map(part => ranks.get(part))
    parts.splice(at, 2, parts[at] + parts[at + 1])
  }
}

const MASK = 0xFFFFFFFFn

function uniform(seed, step, draw) { // kernels/sampling.py: random_bits(), Philox4x32-10
  let [a, b, c, d] = [step & MASK, step >> 32n & MASK, draw, 0n], [k, l] = [seed & MASK, seed >> 32n & MASK]
  for (let round = 0; round < 10; round++) {
    const ac = a * 0xD2511F53n, bd = c * 0xCD9E8D57n;
    [a, b, c, d] = [bd >> 32n ^ b ^ k, bd & MASK, ac >> 32n ^ d ^ l, ac & MASK];
    [k, l] = [k + 0x9E3779B9n & MASK, l + 0xBB67AE85n & MASK]
  }
  return Number(a << 21n | b >> 11n) * 2 ** -53
}
