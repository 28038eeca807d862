"""Everything that only a GPU shows, in ten minutes: run each step as a process of its own, write GPU.md.

    make gpu
    PYTHONPATH=. python3 tests/bench_card.py            the same without make, a network or anything installed
    python tests/bench_card.py --dry --report dry.md    make gpu DRY=1: the same, tiny, on a CPU

It needs torch 2.11 or newer, numpy, and nvcc for the kernels; weights and data are random. Packages that
are not there get stand-ins where a step can do without them, and a step that cannot is skipped by name. A
step that fails, or runs past its limit, stops no other. The last line says how many went well.
"""
import argparse
import contextlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
HERE = os.path.join("tests", os.path.basename(__file__))
MINUTES = 10

# What a bare machine may lack, as far as these steps use it: no audio file, no text, no progress to look at.
STAND_INS = {
    "soundfile": "",
    "tiktoken": "class Encoding:\n"
                "    def __init__(self, name, pat_str, mergeable_ranks, special_tokens):\n"
                "        self.n_vocab = len(mergeable_ranks) + len(special_tokens)\n"
                "    def encode_ordinary(self, text):\n        return [*text.encode()]\n",
    "tqdm": "class tqdm:\n"
            "    def __init__(self, items=(), *args, **options):\n        self.items = items\n"
            "    def __iter__(self):\n        return iter(self.items)\n"
            "    def __enter__(self):\n        return self\n"
            "    def __exit__(self, *error):\n        pass\n"
            "    def __getattr__(self, name):\n        return lambda *args, **options: None\n",
}


@dataclass
class Step:
    name: str
    limit: int  # seconds
    command: list  # "python" is this interpreter
    needs: str = ""  # a package, or the command's program; without it the step is skipped


def steps(dry, work):
    """The steps, in order. What shows most comes first, should the time run out."""
    device, data = "cpu" if dry else "cuda", os.path.join(work, "data")
    own = lambda what, *more: ["python", HERE, "--do", what, "--device", device, "--work", work, *more]
    large, size = ("tiny", "tiny") if dry else ("7b", "small")
    ticks = ["--ticks", "4", "--rounds", "1", "--most", "2"] if dry else ["--ticks", "250"]
    codec = "tiny" if dry else "mimi"
    talk = ["python", "tests/bench_talk.py", "--config", large, "--device", device, "--codec", codec, *ticks]
    training = ["python", "tests/bench_train.py", "--device", device, "--data", data]
    layers = ["--config", large, *(["--layers", "2", "--rounds", "1"] if dry else
                                   ["--layers", "6", "--rounds", "3"])]
    kernels = ["python", "-m", "pytest", "-q", "--noconftest", "-p", "no:cacheprovider",
               "tests/test_kernels.py", "-k",
               "test_random_heads and backwards and sizes0" if dry else "cuda or not cpu"]
    sanitizer = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    return [
        Step("build the kernels for this card", 60, own("build")),
        Step("kernels' tests", 120, kernels, "pytest"),
        Step("a captured frame and compiled layers equal the eager ones", 120, own("captured")),
        Step("where a frame's time goes", 120, [*talk, "step"]),
        Step("the same: weights in eight bits", 120,
             [*talk, "step", "--weights", "int8" if dry else "float8"]),
        Step("how many conversations", 120, [*talk, "sessions"]),
        Step("how many with keys and values in float8", 90, [*talk, "sessions", "--cache", "float8"]),
        Step("sampling and the depth kernel", 90,
             ["python", "kernels/bench.py", "--rows", "5" if dry else "100"]),
        Step("the codec at batch 1 and 64", 60, own("codec")),
        Step("random data", 30, own("data")),
        Step("training stopped by SIGTERM, and resumed", 90, own("resume", "--size", size)),
        Step("utilisation in training", 60, [*training, "--config", size, "--rounds", "1" if dry else "4"]),
        Step("utilisation in training, 7b's layers", 90,
             [*training, *layers]),
        Step("one process under torchrun, losses in small pieces", 60,
             ["python", "-m", "torch.distributed.run", "--nproc_per_node", "1",
              *own("pieces", "--size", "tiny")[1:]]),
        Step("memcheck", 90, [*sanitizer, "memcheck", *own("sanitize")], "compute-sanitizer"),
        Step("racecheck", 90, [*sanitizer, "racecheck", *own("sanitize")], "compute-sanitizer"),
        Step("the same: selective recomputation, samples that do not see each other", 90,
             [*training, *layers, "--recompute", "selective", "--documents"]),
        *([] if dry else [Step("the same: products in float8", 90,
                               [*training, *layers, "--recompute", "selective", "--float8"], "torchao")]),
    ]


# ------------------------------------------------------------------------------------------------------------
# the steps that have no file of their own


def build(args):
    from kernels import build, sampling
    from kernels.build import library
    names = "sampling", "head", "depth"
    if missing := [name for name in names if not library(name, args.device)]:
        sys.exit(f"not built: {', '.join(missing)} (see the warning above)")
    print(f"{', '.join(names)} are built by {'g++' if args.device == 'cpu' else build.nvcc()}; "
          f"conversations use v{sampling.VERSION}")


def sanitize(args):
    from kernels.bench import VERSIONS, differing, differing_depth
    from model import CONFIGS
    wrong = {f"v{v}": differing(v, 4, (256, 2050), args.device) for v in (*VERSIONS, 4)}
    wrong["depth"], _ = differing_depth(CONFIGS["tiny"], 2, args.device)
    print(f"tokens that differ from the reference: {wrong}")
    sys.exit(any(wrong.values()))


def captured(args):
    """Text and audio of forty frames, two conversations, each way; then what compiling the layers changes."""
    import torch
    from bench_talk import random_duplex
    from live.graph import capture
    from mimi import FRAME
    cpu = args.device == "cpu"
    args.config, args.codec, frames = "tiny", "tiny" if cpu else "mimi", 4 if cpu else 40
    duplex = random_duplex(args)
    wav = torch.randn(2, frames * FRAME, generator=torch.Generator().manual_seed(0)).to(args.device) * 0.1

    def talk(run_of):
        state = duplex.init_state([1, 2])
        step = run_of(lambda x: duplex.step(x, state), state)
        said = [[y.cpu() for y in step(x[:, None])] for x in wav.split(FRAME, -1)]
        return [torch.stack(x, 1) for x in zip(*said)]
    text, audio = talk(lambda step, state: step)
    text2, audio2 = talk(lambda step, state: step if cpu else
                         capture(step, wav[:, None, :FRAME].clone(), state.small_tensors()))
    same, off = torch.equal(text, text2), (audio - audio2).abs().max().item()
    print(f"{frames} frames of two conversations: the tokens are {'the same' if same else 'others'}, "
          f"the audio differs by {off:.1e}")
    sys.exit(not same or off > 1e-3 or not compiled_layers(duplex, wav))


def compiled_layers(duplex, wav):
    """Whether the compiled layers compute the same, to bfloat16's rounding; and how many launches they
    save."""
    import torch
    from bench_talk import relative
    from live.graph import compiled, layers_of
    from mimi import FRAME
    from streams import ROWS
    m, codec, cpu = duplex.model, duplex.codec, duplex.device.type == "cpu"
    columns = torch.randint(0, m.config.empty, (8, 2, ROWS), device=duplex.device)
    codes = torch.randint(0, m.config.empty, (8, 2, codec.config.codebooks, 1), device=duplex.device)

    @torch.inference_mode()
    def results():
        cache, state = m.init_cache(2), codec.init_state(2)
        h = [m.hidden_step(column, cache) for column in columns]
        return torch.stack(h), torch.stack([codec.decode_step(c, state) for c in codes])

    @torch.inference_mode()
    def launches():
        state = duplex.init_state([1, 2])
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
            duplex.step(wav[:, None, :FRAME], state)
        return sum(e.device_type == torch.autograd.DeviceType.CUDA for e in seen.events())
    right, before = results(), 0 if cpu else launches()
    with compiled(layers_of(m, codec), "eager" if cpu else "inductor"):
        off = [relative(a, b) for a, b in zip(results(), right)]
        print(f"compiled layers: h differs by {off[0]:.1e} of its size, audio by {off[1]:.1e}")
        if not cpu:
            launches()
            print(f"launches in a frame: {before} eager, {launches()} compiled")
    return off[0] < 0.02 and off[1] < 1e-2


def codec(args):
    import torch
    from live.graph import capture
    from mimi import CONFIGS, FRAME, Mimi
    cpu = args.device == "cpu"
    m = Mimi(CONFIGS["tiny" if cpu else "mimi"]).to(args.device).eval()
    middle = lambda times: 1000 * sorted(times)[len(times) // 2]
    for B in (1, 2) if cpu else (1, 64):
        state, times = m.init_state(B), []
        x = torch.randn(B, 1, FRAME, device=args.device) * 0.1
        with torch.inference_mode():
            for step in (m.encode_step, m.decode_step):
                each = lambda x, step=step: step(x, state)
                run = each if cpu else capture(each, x.clone(), state)
                times.append([])
                for _ in range(3 if cpu else 50):
                    begun = time.perf_counter()
                    y = run(x)
                    cpu or torch.cuda.synchronize()
                    times[-1].append(time.perf_counter() - begun)
                x = y.clone()
        a, b = map(middle, times)
        print(f"batch {B}: {a:.2f} ms to encode a frame, {b:.2f} ms to decode it", flush=True)


def data(args):
    """An encoded folder of dialogues of random codes and tokens, with a codec that has random weights."""
    import base64
    import hashlib
    import numpy as np
    from files.checkpoint import save_checkpoint
    from files.encoded import VERSION, sha256, write_index
    from mimi import CONFIGS, Mimi
    folder, rng, n = os.path.join(args.work, "data"), np.random.default_rng(0), 32
    os.makedirs(folder, exist_ok=True)
    path, config = os.path.join(folder, "codec.pt"), CONFIGS["tiny"]
    save_checkpoint(path, "codec", config, model=Mimi(config).state_dict())
    ranks = {base64.b64encode(bytes([i])).decode(): i for i in range(256)}
    tokenizer = json.dumps({"ranks": ranks, "pattern": ".", "specials": []})
    with open(os.path.join(folder, "tokenizer.json"), "w", encoding="utf-8") as f:
        f.write(tokenizer)
    lines, at = [], 0
    for i in range(400):
        turns = []
        for role in ("user", "model") * 2:
            place = {"shard": 0, "offset": at, "frames": n, "speech": n - 4, "late": 0}
            tokens = rng.integers(0, 256, 8).tolist()
            turns.append({"role": role, "tokens": tokens, "copies": [place]})
            at += n
        split = "seen" if i % 10 == 0 else "train"
        lines.append({"split": split, "kind": "", "annotated": True, "turns": turns})
    with open(os.path.join(folder, "00000.jsonl"), "w", encoding="utf-8") as f:
        f.writelines(json.dumps(line) + "\n" for line in lines)
    np.save(os.path.join(folder, "00000.npy"),
            rng.integers(0, config.codebook_size, (at, config.codebooks)).astype("<i2"))
    write_index(folder, 1)
    meta = {"version": VERSION, "codec_sha256": sha256(path), "manifest_sha256": "",
            "tokenizer_sha256": hashlib.sha256(tokenizer.encode()).hexdigest(), "shards": [[0, 0]],
            "codebooks": config.codebooks, "codebook_size": config.codebook_size,
            "silence": [[0] * config.codebooks], "copies": 1, "augment": 0.0}
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as f:
        json.dump(meta, f)
    print(f"{len(lines)} dialogues, {at} frames of random codes")


def training(args, *more):
    """The flags of train.py for a short run on the random data."""
    tiny = ["--frames", "64", "--batch", "2", "--layers", "1", "--steps", "16"]
    short = tiny if args.device == "cpu" else ["--steps", "60"]
    return ["--config", args.size, "--data", os.path.join(args.work, "data"), "--device", args.device,
            *short, *more]


def resume(args):
    """SIGTERM when the first steps are logged; the rest after --resume."""
    out = os.path.join(args.work, "resumed")
    command = [sys.executable, "train.py", *training(args, "--out", out, "--resume")]
    first = subprocess.Popen(command, cwd=ROOT)
    while first.poll() is None and not os.path.exists(os.path.join(out, "log.jsonl")):
        time.sleep(0.02)
    first.terminate()
    if first.wait() != 128 + signal.SIGTERM:
        sys.exit(f"the run did not stop and save at SIGTERM, but ended with {first.returncode}")
    begun = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    print(f"resumed and done in {time.perf_counter() - begun:.1f} s")


def pieces(args):
    import model
    import train
    model.PIECE = 1 << 16
    sys.argv = ["train.py", *training(args, "--out", os.path.join(args.work, "pieces"))]
    train.main()


# ------------------------------------------------------------------------------------------------------------
# running them


def found(step):
    find = shutil.which if step.needs == step.command[0] else importlib.util.find_spec
    return not step.needs or bool(find(step.needs))


def stand_ins(folder):
    """Writes what stands in for missing packages into the folder. Returns their names."""
    missing = [name for name in STAND_INS if not importlib.util.find_spec(name)]
    for name in missing:
        with open(os.path.join(folder, f"{name}.py"), "w", encoding="utf-8") as f:
            f.write(STAND_INS[name])
    return missing


def run(step, seconds, environment, patience=1):
    """(verdict, seconds it took, what it printed). The step's own processes end with it."""
    if not found(step):
        return f"skipped: no {step.needs} here", 0.0, ""
    if seconds <= 0:
        return "skipped: the time is over", 0.0, ""
    begun, limit = time.monotonic(), min(step.limit * patience, seconds)
    command = [sys.executable if word == "python" else word for word in step.command]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as printed:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=printed,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(limit)
            verdict = "ok" if code == 0 else f"FAILED ({code})"
        except subprocess.TimeoutExpired:
            verdict = f"FAILED: not done in {limit:.0f} s"
            stop(process)
        printed.seek(0)
        return verdict, time.monotonic() - begun, printed.read()


def stop(process):
    """SIGTERM first: torchrun's workers are in sessions of their own, and only torchrun ends them."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(10)


def machine(dry):
    """Lines that say where this ran."""
    import torch
    ask = lambda *command: subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    lines = [f"Python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}",
             f"commit {ask('git', 'describe', '--always', '--dirty') if shutil.which('git') else 'unknown'}"]
    if dry:
        return ["A dry run: tiny sizes on a CPU. It shows that the script works, nothing of a GPU.", *lines]
    from kernels.build import nvcc
    compiler = (ask(nvcc(), "--version") if os.path.exists(nvcc()) else "no nvcc").split("\n")[-1]
    p = torch.cuda.get_device_properties(0)
    driver = ask("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit",
                 "--format=csv,noheader") if shutil.which("nvidia-smi") else "unknown"
    return [f"{p.name}: {p.multi_processor_count} multiprocessors, {p.total_memory / 1e9:.1f} GB, capability "
            f"{p.major}.{p.minor}", f"driver, clock, power: {driver}", f"CUDA {torch.version.cuda}, "
            f"{compiler}", *lines]


def write_report(path, title, results):
    """Markdown: the machine, a table of verdicts, then what each step printed."""
    from files.atomic import write_text
    parts = ["# What a GPU shows\n", *(f"- {line}" for line in title), "", "| step | verdict | seconds |",
             "|---|---|---|"]
    parts += [f"| {step.name} | {verdict} | {took:.1f} |" for step, verdict, took, _ in results]
    for step, verdict, _, printed in results:
        shown = [line for line in printed.splitlines() if "%|" not in line][-40:]  # no progress bars
        parts += [f"\n## {step.name}: {verdict}\n", f"    {' '.join(step.command)}\n", "```", *shown, "```"]
    write_text(path, "\n".join(parts) + "\n")


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    own = {f.__name__: f for f in (build, sanitize, captured, codec, data, resume, pieces)}
    add = parser.add_argument
    add("--dry", action="store_true", help="tiny sizes on a CPU")
    add("--report", default="GPU.md")
    add("--do", choices=own, help="one of the steps that this file holds, in this process")
    add("--device", default="cuda", help="with --do")
    add("--work", default=".", help="with --do: a folder for data and runs")
    add("--size", default="small", help="with --do: of the model that is trained")
    args = parser.parse_args()
    if args.do:
        return own[args.do](args)
    import torch
    if not args.dry and not torch.cuda.is_available():
        sys.exit(f"error: PyTorch {torch.__version__} finds no CUDA GPU; --dry runs tiny sizes on the CPU")
    begun, results, patience = time.monotonic(), [], 10 if args.dry else 1  # a busy CPU proves nothing
    with tempfile.TemporaryDirectory() as work:
        missing = stand_ins(work)
        path = os.pathsep.join(filter(None, [ROOT, work, os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "PYTHONPATH": path}
        title = machine(args.dry) + [f"stand-ins for {', '.join(missing)}"] * bool(missing)
        if not args.dry and not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
            environment["TORCHDYNAMO_DISABLE"] = "1"
            title.append("no Python.h: nothing is compiled by torch.compile (apt install python3-dev)")
        for step in steps(args.dry, work):
            uncached = "compute-sanitizer" in step.command  # so that it sees where each tensor ends
            env = environment | ({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if uncached else {})
            left = 60 * MINUTES * patience - (time.monotonic() - begun)
            results.append((step, *run(step, left, env, patience)))
            print(f"{step.name}: {results[-1][1]} ({results[-1][2]:.1f} s)", flush=True)
            write_report(args.report, title, results)
    count = lambda word: sum(verdict.startswith(word) for _, verdict, *_ in results)
    print(f"Wrote {args.report}: {count('ok')} ok, {count('FAILED')} failed, {count('skipped')} skipped, "
          f"{time.monotonic() - begun:.0f} s")
    sys.exit(count("FAILED") > 0)


if __name__ == "__main__":
    main()
