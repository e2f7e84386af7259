"""Image classification data."""
