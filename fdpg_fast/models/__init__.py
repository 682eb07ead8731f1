"""Transformers models behind one scoring path."""
