"""How fast and how big a training step is: real steps on random samples, next to a plain trainer's."""
