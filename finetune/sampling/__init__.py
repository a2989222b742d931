"""Pictures from a base model and an adapter, and sheets that show them side by side."""
