"""Drop-in modules around the operations."""
