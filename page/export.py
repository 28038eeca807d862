"""A page that holds the model itself: no server but one for files, no account, nothing uploaded.

    python -m page.export out/talk out/page
    python -m http.server --bind 127.0.0.1 --directory out/page        http://127.0.0.1:8000

Any static host can serve the folder; browsers give a microphone to pages from https or from this machine.

    index.html      live/web.html, with a strict content security policy and the facts about the model
    local.js        stands in for the page's WebSocket
    worker.js       runs the model; offline.js keeps the page for times without a network
    model.bin       chat.py's step as an ONNX graph (step.py) with narrow weights, widened when it is loaded
    ort..., runtime.bin     ONNX Runtime Web, from npm: its JavaScript and its WebAssembly
    request-0.flac ...      the requests that the page lists, if espeak-ng is there to speak them

The two large files are compressed here, by gzip, so that it does not take a server that compresses.
"""
import argparse
import base64
import gzip
import hashlib
import html
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import warnings
from dataclasses import replace

import soundfile
import torch

from page.step import ExportedStep
from chat import DuplexModel
from files.atomic import check_folder, move_folder, replace_when_done, write_text
from files.audio import SAMPLE_RATE
from files.checkpoint import layouts_of
from kernels.sampling import Sampling
from mimi import FRAME
from streams import K
from toy.voices import Espeak, speak

HERE = os.path.dirname(os.path.abspath(__file__))
WEB = os.path.join(os.path.dirname(HERE), "live", "web.html")
SCRIPTS = ("local.js", "worker.js", "offline.js")
TOY_VOCAB = 2048  # text tokens at most of a model of the toy world, whose requests the page lists

RUNTIME = "onnxruntime-web@1.30.0"
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
ORT_JS, ORT_WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"

FILES = ("index.html", "model.bin", "runtime.bin", *SCRIPTS, ORT_JS)
FOLDER = "|".join(map(re.escape, FILES)) + r"|request-\d\.flac"
LARGE = 1024  # numbers of a tensor that is worth narrowing
MOST = 1 << 28  # parameters of a model that a browser may be asked to hold: a gigabyte, widened


# ------------------------------------------------------------------------------------------------------------
# the graph


def export_step(duplex, weights="float16"):
    """The graph of a step, an onnx.ModelProto, and the state that a conversation starts with, {name: tensor}.
    weights: float32, float16 or int8. ValueError if a package is missing or the model is too large."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401  torch.onnx.export needs it
    except ImportError:
        raise ValueError("the export needs the extra 'page': pip install '.[page]'") from None
    numbers = sum(p.numel() for module in (duplex.model, duplex.codec) for p in module.parameters())
    if numbers > MOST:
        raise ValueError(f"the model has {numbers / 1e6:.0f} M parameters, too many for a page (at most "
                         f"{MOST / 1e6:.0f} M)")
    step = ExportedStep(duplex).eval()
    if weights != "float32":
        for p in step.parameters():  # the codebooks are none: rounding them would change codes
            p.data = p.data.half().float()
    start = step.start
    inputs = torch.zeros(1, 1, FRAME), torch.zeros(1, 1 + K, dtype=torch.float64), list(start.values())
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns about packages that nothing here needs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(step, inputs, dynamo=True, verbose=False,
                                    input_names=["wav", "uniforms", *start],
                                    output_names=["text", "said", *(f"next.{name}" for name in start)])
    graph = program.model_proto
    del graph.graph.value_info[:]
    for part in (graph.graph, *graph.graph.node, *graph.graph.initializer, *graph.graph.output):
        del part.metadata_props[:]  # from which line of the source each comes: a megabyte
    narrow(graph.graph, weights == "int8")
    return graph, start


def narrow(graph, int8):
    """Store the large tensors that half precision holds exactly as such, or with int8 as eight bits and a
    scale for each row. The graph widens them first of all, so the runtime does it once, while it loads."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper
    first = []
    for tensor in [t for t in graph.initializer if t.data_type == TensorProto.FLOAT]:
        x, name = numpy_helper.to_array(tensor), tensor.name
        if x.size < LARGE or not np.array_equal(x, x.astype(np.float16).astype(np.float32)):
            continue
        graph.initializer.remove(tensor)
        if int8 and x.ndim > 1:
            scale = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12) / 127
            add = {f"{name}.int8": np.round(x / scale).astype(np.int8),
                   f"{name}.scale": scale.astype(np.float32)}
            first += [helper.make_node("Cast", [f"{name}.int8"], [f"{name}.wide"], to=TensorProto.FLOAT),
                      helper.make_node("Mul", [f"{name}.wide", f"{name}.scale"], [name])]
        else:
            add = {f"{name}.float16": x.astype(np.float16)}
            first.append(helper.make_node("Cast", [f"{name}.float16"], [name], to=TensorProto.FLOAT))
        graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in add.items())
    nodes = [*first, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


# ------------------------------------------------------------------------------------------------------------
# the page


def runtime(path):
    """ONNX Runtime Web's JavaScript and WebAssembly, from npm's archive at `path`, which npm fetches if it is
    not there. ValueError if it is another archive than the pinned one."""
    if not os.path.isfile(path):
        npm = shutil.which("npm")
        if npm is None:
            raise ValueError(f"{path}: no such file, and no npm to fetch it; install npm, or put there what "
                             f"`npm pack {RUNTIME}` fetches")
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([npm, "pack", "--silent", "--pack-destination", folder, RUNTIME],
                                  capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"npm pack {RUNTIME}: {done.stderr.strip()[-300:] or 'failed'}")
            with replace_when_done(path) as temporary:
                shutil.copyfile(os.path.join(folder, os.listdir(folder)[0]), temporary)
    with open(path, "rb") as f:
        if base64.b64encode(hashlib.sha512(f.read()).digest()).decode() != INTEGRITY:
            raise ValueError(f"{path}: is not {RUNTIME} as pinned here, or is damaged; remove it")
    with tarfile.open(path) as archive:
        return [archive.extractfile(f"package/dist/{name}").read() for name in (ORT_JS, ORT_WASM)]


def facts_of(duplex, start, large, download, layouts):
    """What the page has to know about the model, for JSON. large: {name: bytes} of what it unpacks;
    download: bytes of all files as they are sent. layouts: names of those that it was trained on."""
    def describe(name, x):
        kind = {torch.int64: "int64", torch.float32: "float32", torch.bool: "bool"}[x.dtype]
        values = {"values": x.flatten().tolist()} if x.any() else {}
        return {"name": name, "type": kind, "dims": list(x.shape), **values}
    v = duplex.vocab
    files = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
             for name, data in large.items()}
    return {"state": [describe(*pair) for pair in start.items()], "draws": 1 + K, "wait": v.wait,
            "asr": v.asr, "answer": v.answer,
            "typed": duplex.tokenizer.name == "own" and any(x.startswith("typed:") for x in layouts),
            "tokens": [token_bytes(duplex.tokenizer, i) for i in range(v.text_size)],
            "files": files, "toy": v.text_size <= TOY_VOCAB, "download": download}


def token_bytes(tokenizer, token):
    try:
        return base64.b64encode(tokenizer.decode_single_token_bytes(token)).decode()
    except KeyError:  # published vocabularies are padded with ids that mean nothing
        return None


def recordings(web):
    """The requests that the page lists, spoken, for those without a microphone: {name: bytes}, or {} without
    espeak-ng."""
    try:
        synthesiser = Espeak()
    except ValueError:
        return {}
    files = {}
    for n, text in enumerate(re.findall("<dt>(.*?)</dt>", web)):
        parts, sound = re.split("(?<=,) ", html.unescape(text)), io.BytesIO()
        audio, _ = speak(synthesiser, parts, [0.6] * (len(parts) - 1), "en-us+f3")
        soundfile.write(sound, audio, SAMPLE_RATE, format="FLAC")
        files[f"request-{n}.flac"] = sound.getvalue()
    return files


def page_of(web, facts):
    """live/web.html with the engine in it: the text of index.html."""
    def hashes(tag):
        inline = [part.split(f"</{tag}>")[0] for part in web.split(f"<{tag}>")[1:]]
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(x.encode()).digest()).decode()}'"
                        for x in inline)
    policy = ("default-src 'none'; base-uri 'none'; form-action 'none'; connect-src 'self'; img-src data:; "
              f"style-src {hashes('style')}; worker-src 'self' blob:; "
              f"script-src 'self' blob: 'wasm-unsafe-eval' {hashes('script')}")
    data = json.dumps(facts, separators=(",", ":")).replace("<", "\\u003c")
    head = f'<meta charset="utf-8">\n<meta http-equiv="Content-Security-Policy" content="{policy}">'
    engine = (f'<script id="facts-of-model" type="application/json">{data}</script>\n'
              '<script src="local.js"></script>\n\n<script>')
    web = web.replace('<meta charset="utf-8">', head, 1)
    if facts.get("typed"):
        web = web.replace('<html lang="en">', '<html lang="en" data-fields="typed">', 1)
    before, script = web.rsplit("<script>", 1)  # the page's own: the engine is there before it
    return before + engine + script


def build(duplex, out, archive, weights, layouts=()):
    """Writes the folder. Returns the facts. layouts: see facts_of."""
    out, work = check_folder(out, FOLDER, replace=True)
    script, wasm = runtime(archive)
    graph, start = export_step(duplex, weights)
    large = {"model.bin": graph.SerializeToString(), "runtime.bin": wasm}
    files = {ORT_JS: script, **{name: gzip.compress(data, mtime=0) for name, data in large.items()}}
    for name in SCRIPTS:
        with open(os.path.join(HERE, name), "rb") as f:
            files[name] = f.read()
    with open(WEB, encoding="utf-8") as f:
        web = f.read()
    facts = facts_of(duplex, start, large, sum(map(len, files.values())), layouts)
    spoken = recordings(web) if facts["toy"] else {}
    files |= spoken
    facts["recordings"] = list(spoken)
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    write_text(os.path.join(work, "index.html"), page_of(web, facts))
    for name, data in files.items():
        with open(os.path.join(work, name), "wb") as f:
            f.write(data)
    move_folder(work, out)
    return facts


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("checkpoint", help="folder that train.py or live.packed wrote")
    parser.add_argument("out", help="folder to write; one that this command wrote is replaced")
    parser.add_argument("--weights", choices=("float32", "float16", "int8"), default="float16",
                        help="how the file stores them; computation is in float32 (default: %(default)s)")
    parser.add_argument("--runtime", default=f"out/{RUNTIME.replace('@', '-')}.tgz",
                        help="npm's archive of ONNX Runtime Web; fetched if missing (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="of text and audio; 0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, help="sample from the k most probable; 0 for all")
    parser.add_argument("--top-p", type=float, default=1.0,
                        help="sample from the most probable that sum to p")
    args = parser.parse_args()
    try:
        how = Sampling(args.temperature, args.top_k, args.top_p)
        duplex = DuplexModel.load(args.checkpoint)
        duplex.sampling = [replace(old, temperature=how.temperature, top_k=how.top_k, top_p=how.top_p)
                           for old in duplex.sampling]
        facts = build(duplex, args.out, args.runtime, args.weights, layouts_of(args.checkpoint))
    except (ValueError, OSError) as e:
        sys.exit(f"error: {e}")
    print(f"Wrote {args.out}: {facts['download'] / 1e6:.1f} MB to load; next: python -m http.server "
          f"--bind 127.0.0.1 --directory {args.out}")


if __name__ == "__main__":
    main()
