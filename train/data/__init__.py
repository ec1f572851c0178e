"""Reading motion with captions."""
