"""What an artifact is, and how it is loaded: neither PyTorch nor the compiler is needed here."""
