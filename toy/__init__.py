"""The default world, made on the spot: what is said, who says it, and the codec that learns from it."""
