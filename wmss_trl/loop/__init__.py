"""A run: its phases, its epochs, what is saved and what is refused."""
