"""One copy of the weights: trace the engine's loader, plan the views, alias, verify, copy what cannot be shared."""
