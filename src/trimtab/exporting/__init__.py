"""A trained model's adapter for others: plain LoRA, one uniform rank, or merged."""
