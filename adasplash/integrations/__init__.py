"""Other libraries' models on this attention. Nothing here is imported by ``import adasplash``."""
