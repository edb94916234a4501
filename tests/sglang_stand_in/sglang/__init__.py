"""Stands in for SGLang 0.5.23: the names that jaxnsa replaces, and modules that import them."""
