"""Facts about this machine that decide how fast a model runs, and advice. No model is loaded."""
