"""Sampling one token from logits, in PyTorch and in CUDA; and the laboratory of the kernel's versions."""
