"""Random programs of library calls, run where a crash ends a child and not the search.

| module | what |
| --- | --- |
| `search` | draws programs by Hypothesis, in child processes |
| `kinds` | what calls and registered tensors there are, and illegal values of their arguments |
| `steps`, `tensor_steps`, `sgl_steps` | what a program consists of: each step calls and checks |
| `program` | a program as its source |
| `smaller` | a program that fails, made plainer |

Hypothesis is an optional package: the extra `test` has it.
"""
