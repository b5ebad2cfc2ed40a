"""Training: `inlay train RECIPE`, on accelerate; one readable file per recipe (docs/train.md)."""
