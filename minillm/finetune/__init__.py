"""Floor 3: fine-tuning, where models and adapters meet."""
