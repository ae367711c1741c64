"""The LightningModule and what training needs: objective, optimizer, strategies, checkpoints."""
