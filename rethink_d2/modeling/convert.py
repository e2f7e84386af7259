"""Public weights into this project's names."""
