"""Reading and writing audio, data, checkpoints. No file is trusted, and none is left half-written."""
