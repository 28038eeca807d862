"""Live conversations: many in one batch, late frames, the microphone, the page and its server."""
