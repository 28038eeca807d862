"""A model that was trained on other voices learns yours: prompts, recordings, five minutes of fine-tuning."""
