"""For PyTorch engines.

`jaxnsa.interop.torch` hands metadata over without copies and fills an engine's static buffers;
`jaxnsa.interop.sgl_kernel` has the functions that engines call today, by their names, and
`jaxnsa.interop.sglang` those of SGLang 0.5.23, which it can put in place of an installed one's.
"""
