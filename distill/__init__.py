"""Training: a base model and a recipe become a flash LoRA."""
