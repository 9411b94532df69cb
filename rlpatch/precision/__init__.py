"""The precision of the trainer's weights: half precision shared with the engine, float32 masters for the optimizer."""
