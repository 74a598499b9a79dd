"""Training: matching, losses, augmentation, stages and the loop."""
