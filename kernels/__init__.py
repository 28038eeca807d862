"""One token from logits, in PyTorch and in CUDA. The model uses sampling.py with sampling.cu, and build.py,
which compiles it; head.py with head.cu, and bench.py, are a laboratory that nothing else imports."""
