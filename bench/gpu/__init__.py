"""The proof on a card: python -m bench.gpu, see __main__.py."""
