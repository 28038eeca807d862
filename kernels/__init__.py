"""Logits in, tokens out: sampling in PyTorch and CUDA. Conversations use sampling.py, sampling.cu, common.h
and build.py. cpu.h runs the kernels without a GPU, for tests. Laboratory: v1, v2, head, depth, bench."""
