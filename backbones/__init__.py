"""What FG-CROSS stands on: CLIP's towers, adapters, and weights in anybody's naming."""
