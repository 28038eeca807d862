"""What is read and written: audio, checkpoints, manifests, tokenisers. No file is trusted, none is left half-written."""
