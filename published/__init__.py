"""Weights that others have published, read strictly: Qwen2.5, the FLM-Audio release, Mimi."""
