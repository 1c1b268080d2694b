"""Training with torch: model, recipe, batches, trainer, checkpoint. Needs the extra ``train``."""
