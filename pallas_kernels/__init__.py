"""Pallas Mosaic GPU kernels for the attention metadata of DeepSeek sparse attention."""
