"""Published weights, loaded strictly: Qwen2.5, the FLM-Audio release, Mimi."""
