"""How fast: training steps, prompts and decoding, against dense models and against peers."""
