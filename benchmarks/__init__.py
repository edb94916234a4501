"""Benchmarks: `python -m benchmarks --help`.

`measure` times calls, `problem` makes and checks their inputs, each file in `suites` is one table,
`report` writes what was measured, `plots` draws it, `compare` sets two runs side by side, and
`readme` puts the results into the README.
"""
