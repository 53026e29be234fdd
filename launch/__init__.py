"""One short file per program: its TorchX component, and what it runs."""
