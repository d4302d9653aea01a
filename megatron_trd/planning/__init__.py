"""What a run holds in memory and how long it takes, from configuration files alone: no GPU, no weights, no torch."""
