"""The kernels give the reference's tokens. Without a GPU the same source runs on the CPU, its threads in
order and in reverse order."""
import ctypes
import dataclasses
import functools
import os
import shutil
import subprocess
import sys
import types

import pytest
import torch

from kernels import bench, build
from kernels.bench import VERSIONS, by_kernel, differing, differing_depth, random_depth, random_frame
from kernels.build import library
from kernels.depth import generate, generate_reference, pack
from kernels.head import head_kernel, head_reference
from kernels.sampling import VERSION, Sampling, kernel, reference, sample
from model import CONFIGS
from test_sampling import chi_square_sigmas

needs_nvcc = pytest.mark.skipif(not os.path.exists(build.nvcc()), reason="no nvcc")
needs_gpp = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = pytest.param("cuda", marks=[needs_gpu, needs_nvcc])
CPU, CPU_BACKWARDS = (pytest.param(name, marks=needs_gpp) for name in ("cpu", "cpu backwards"))
every_version = pytest.mark.parametrize("version", VERSIONS)


@pytest.fixture(params=[CPU, CPU_BACKWARDS, GPU])
def device(request):
    device, *order = request.param.split()
    libs = [library(name, device) for name in ("sampling", "head", "depth")]
    assert all(libs), "the kernels could not be built"
    flags = [ctypes.c_int.in_dll(lib, "backwards") for lib in libs if device == "cpu"]
    for flag in flags:
        flag.value = bool(order)
    yield device
    for flag in flags:
        flag.value = 0


# in v3 one block has a row of 2050 entries, several have one of 12000
@every_version
@pytest.mark.parametrize("rows, sizes", [(40, (256, 257, 1000, 2050)), (9, (12000,))])
def test_random_rows(version, rows, sizes, device):
    assert differing(version, rows, sizes, device, seed=version) == 0


@every_version
def test_a_large_vocabulary(version, device):
    logits = torch.randn(2, 152064, generator=torch.Generator().manual_seed(0)).bfloat16().to(device) * 2
    ids = torch.tensor([3, 2 ** 62], device=device)
    recent = logits.topk(4).indices
    for s in (Sampling(penalty=1.5), Sampling(0.9, top_p=0.8, penalty=1.2)):
        token = by_kernel(version, logits, s, ids, ids, 1, recent)
        assert token.tolist() == reference(logits, s, ids, ids, 1, recent).tolist()


@pytest.mark.slow
@every_version
@pytest.mark.parametrize("thousand", range(10))
def test_ten_thousand_random_rows(version, thousand, device):
    seed = 100 * version + 10 * thousand
    assert differing(version, 970, (256, 300, 1023, 2050), device, seed) == 0
    assert differing(version, 29, (11264, 11265, 40000), device, seed + 1) == 0
    assert differing(version, 1, (152064,), device, seed + 2) == 0


@every_version
@pytest.mark.parametrize("s", [Sampling(penalty=1.5), Sampling(0.8, 50, 0.9, 1.3)])
def test_many_rows(version, s, device):
    """More than a small GPU holds at once; in v3, where two blocks have a row, its last round is not full.
    All parameters are in it."""
    logits = torch.randn(11, 11300, generator=torch.Generator().manual_seed(0))
    logits[7] = torch.nan
    ids, recent = torch.arange(11, device=device), logits.topk(40).indices.to(device)
    logits = logits.to(device)
    token = by_kernel(version, logits, s, ids, ids, 0, recent)
    assert token.tolist() == reference(logits, s, ids, ids, 0, recent).tolist()


@every_version
@pytest.mark.parametrize("s", [Sampling(), Sampling(1.0), Sampling(0.8, 2, 0.9), Sampling(1e-42),
                               Sampling(1.0, 3, 1e-42)])
@pytest.mark.parametrize("V", [256, 12000])
def test_invalid_rows_give_no_token(version, s, V, device):
    inf, nan = torch.inf, torch.nan
    logits = torch.full((5, V), -inf)
    logits[0, 100:102], logits[1, V - 1], logits[3, 17], logits[4, V - 9] = nan, inf, -1e30, -nan
    ids = torch.zeros(5, dtype=torch.long, device=device)
    assert by_kernel(version, logits.to(device), s, ids, ids).tolist() == [-1, -1, -1, 17, -1]


@every_version
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_token_among_others(version, dtype, device):
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[2, 5] = torch.nan
    logits, ids, s = logits.to(device), torch.arange(4, device=device), Sampling(0.8, 20)
    token = by_kernel(version, logits, s, ids, ids)
    assert token[2] == -1 and token.tolist() == reference(logits, s, ids, ids).tolist()
    assert sample(logits, s, ids, ids).tolist() == token.tolist()


@pytest.mark.parametrize("version", [None, 1, 3])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_the_distribution(version, device):
    """None is the reference. Fibers are slow, so on the CPU v3 draws less often."""
    n = 300 if version == 3 and device == "cpu" else 20000
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ranked, order = (logits / 1.3).softmax(-1).sort(descending=True)
    ranked[20:] = 0
    ranked /= ranked.sum()
    ranked[ranked.cumsum(-1) - ranked >= 0.97] = 0
    assert 10 < (ranked > 0).sum() < 20  # both top-k and top-p have taken some
    p = torch.zeros(24, dtype=torch.float64).scatter(0, order, ranked / ranked.sum())
    steps, s = torch.arange(n, device=device), Sampling(1.3, 20, 0.97)
    seed, x = torch.full_like(steps, 5), logits.float().to(device).expand(n, -1)
    draw = reference if version is None else functools.partial(by_kernel, version)
    tokens = draw(x, s, seed, steps).cpu()
    assert chi_square_sigmas(tokens, p) < 4
    assert chi_square_sigmas(tokens, (p > 0) / (p > 0).sum()) > 10  # another distribution is noticed


def test_pytorch_operator(device):
    logits = torch.randn(3, 256, generator=torch.Generator().manual_seed(0)).to(device)
    ids, recent = torch.arange(3, device=device), torch.zeros(3, 2, dtype=torch.long, device=device)
    torch.library.opcheck(kernel, (logits, ids, ids, recent, 1, 0.8, 50, 0.9, 1.2))
    torch.library.opcheck(kernel, (logits, ids, ids, None, 1, 0.8, 50, 0.9, 1.2, 1))
    f = lambda x: by_kernel(VERSION, x * 2, Sampling(0.8), ids, ids) + 1
    compiled = torch.compile(f, fullgraph=True, backend="eager")
    assert compiled(logits).equal(sample(logits * 2, Sampling(0.8), ids, ids) + 1)


def test_scratch_is_allocated_only_where_it_is_used(device):
    scratch_bytes = library("sampling", device).scratch_bytes
    assert [scratch_bytes(version, 64, 2050) for version in VERSIONS] == [0, 4 * 64 * 2050, 0]
    assert scratch_bytes(3, 1, 152064) > 0


@every_version
@pytest.mark.parametrize("device", [GPU])
@pytest.mark.parametrize("V", [2050, 152064])
def test_in_a_cuda_graph(version, V, device):
    """Captured once, it keeps drawing: whatever changes from step to step is on the device."""
    logits, seed, s = torch.randn(2, V, device=device), torch.arange(2, device=device), Sampling(1.0, 50, 0.9)
    step = torch.zeros(2, dtype=torch.long, device=device)
    by_kernel(version, logits, s, seed, step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = by_kernel(version, logits, s, seed, step)
        step += 1
    for i in range(5):
        logits.normal_()
        graph.replay()
        assert tokens.equal(reference(logits, s, seed, torch.full_like(step, i)))


# ------------------------------------------------------------------------------------------------------------
# head.cu (v4): the head's matrix product and the draw


@pytest.mark.parametrize("sizes", [(1, 7, 256), (2050,)])
def test_random_heads(sizes, device):
    assert differing(4, 20, sizes, device) == 0


@pytest.mark.slow
@pytest.mark.parametrize("thousand", range(10))
def test_ten_thousand_rows_through_random_heads(thousand, device):
    assert differing(4, 980, (60, 256, 300), device, 400 + thousand) == 0
    assert differing(4, 20, (1023, 2050), device, 500 + thousand) == 0


@pytest.mark.parametrize("device", [CPU, GPU])
@pytest.mark.parametrize("f", [head_reference, head_kernel])
def test_the_distribution_of_a_head(f, device):
    n = 20000 if f is head_reference or device == "cuda" else 2000
    g = torch.Generator().manual_seed(1)
    x, weight = torch.randn(16, generator=g), torch.randn(24, 16, generator=g) * 0.3
    p = (weight.double() @ x.double() / 1.3).softmax(-1)
    steps = torch.arange(n, device=device)
    x, weight, seed = x.to(device).expand(n, -1).contiguous(), weight.to(device), torch.full_like(steps, 5)
    tokens = f(x, weight, 1.3, seed, steps).cpu()
    assert chi_square_sigmas(tokens, p) < 4
    assert chi_square_sigmas(tokens, p.softmax(-1)) > 10  # another distribution is noticed


# ------------------------------------------------------------------------------------------------------------
# depth.cu: the codes of a frame. A norm is not exact, so the logits are only close to those of a Depth that
# is given the codes. But the codes are the very ones that sample() draws from these logits.

NARROW = dataclasses.replace(CONFIGS["tiny"], width=32, heads=2, depth_width=40, empty=100)
WIDE = dataclasses.replace(CONFIGS["tiny"], depth_layers=1, depth_width=384, depth_heads=8)


# of WIDE's rows not all fit into the shared memory that cpu.h has
@pytest.mark.parametrize("config, B", [(NARROW, 1), (NARROW, 4), (WIDE, 2)])
def test_random_frames(config, B, device):
    wrong, off = differing_depth(config, B, device, seed=B)
    assert wrong == 0 and off < 1e-4


@pytest.mark.slow
def test_a_frame_of_the_release(device):
    config = dataclasses.replace(CONFIGS["7b"], depth_layers=1)
    wrong, off = differing_depth(config, 1, device)
    assert wrong == 0 and off < 1e-4


def test_greedy_codes_are_those_of_the_model(device):
    """The best logit is further from the second than rounding can move it."""
    depth, (h, V, _, *ids, _) = random_depth(NARROW, device), random_frame(NARROW, 3, device, seed=5)
    right, logits = generate_reference(depth.double(), h.double(), V, [Sampling()] * 8, *ids)
    first, second = logits.topk(2).values.unbind(-1)
    assert (first - second).min() > 1e-3
    codes, _ = generate(depth.float(), pack(depth), h, V, [Sampling()] * 8, *ids)
    assert codes.equal(right)


def test_a_frame_without_numbers_among_others(device):
    """The others' codes are those that they get without it."""
    depth, (h, V, sampling, *ids, _) = random_depth(NARROW, device), random_frame(NARROW, 3, device)
    weights, h[1, 3] = pack(depth), torch.nan
    codes, _ = generate(depth, weights, h, V, sampling, *ids)
    assert codes[1].tolist() == [-1] * 8
    alone, _ = generate(depth, weights, h[::2], V, sampling, *(x[::2] for x in ids))
    assert codes[::2].equal(alone)


@pytest.mark.parametrize("device", [GPU])
def test_a_frame_in_a_cuda_graph(device):
    depth, (h, *rest) = random_depth(NARROW, device), random_frame(NARROW, 2, device)
    weights = pack(depth)
    generate(depth, weights, h, *rest)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        codes, _ = generate(depth, weights, h, *rest)
    for _ in range(3):
        h.normal_()
        graph.replay()
        assert codes.equal(generate(depth, weights, h, *rest)[0])


# ------------------------------------------------------------------------------------------------------------
# bench.py


def test_the_bench_needs_no_installed_package():
    code = f"""if True:
        import importlib.util, runpy, sys
        sys.path = [p for p in sys.path if not importlib.machinery.PathFinder.find_spec("kernels", [p])]
        sys.meta_path = [f for f in sys.meta_path if "editable" not in getattr(f, "__module__", "")]
        for name in ("tiktoken", "soundfile", "tqdm", "pytest", "flashinfer"):
            sys.modules[name] = None
        assert not importlib.util.find_spec("kernels")
        print(runpy.run_path({bench.__file__!r})["VERSIONS"])"""
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{VERSIONS}\n"


def test_flashinfer_reads_no_generator_while_captured(monkeypatch):
    calls = []
    module = types.ModuleType("flashinfer.sampling")
    module.top_k_top_p_sampling_from_logits = lambda *args, **options: calls.append(options)
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)
    bench.candidates(torch.randn(2, 9), Sampling(0.8, 5, 0.9))["FlashInfer"]()
    assert calls == [{"seed": 0, "offset": 0}]


# ------------------------------------------------------------------------------------------------------------
# Building


@needs_gpp
def test_builds_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    command = ["g++", *build.CPU, "-O0"]
    path = build.build("sampling", command)
    assert os.listdir(tmp_path / "nanoflm") == [os.path.basename(path)]
    before = os.stat(path).st_mtime_ns
    assert build.build("sampling", command) == path and os.stat(path).st_mtime_ns == before
    with pytest.raises(subprocess.CalledProcessError):
        build.build("sampling", ["g++", "--no-such-flag"])
    assert os.listdir(tmp_path / "nanoflm") == [os.path.basename(path)]


def test_without_a_compiler_the_reference_is_used(tmp_path, monkeypatch):
    logits, ids, s = torch.randn(3, 256), torch.arange(3), Sampling(1.0, 9)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match="sampling.cu is not used.*g\\+\\+"):
        assert library.__wrapped__("sampling", "cpu") is None
    monkeypatch.setattr("kernels.sampling.library", lambda *_: None)
    assert by_kernel(VERSION, logits, s, ids, ids).equal(reference(logits, s, ids, ids))


@pytest.mark.slow
@needs_nvcc
@pytest.mark.parametrize("name", ["sampling", "head", "depth"])
@pytest.mark.parametrize("arch", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_it_compiles_for_every_gpu(arch, name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert os.path.getsize(build.build(name, build.gpu_command(arch))) > 0
