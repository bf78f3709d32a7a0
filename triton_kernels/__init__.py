"""Device code: Triton kernels and the functions that launch them. Imports torch and triton, nothing else.

The public operators in `fastrcnn.ops` import these modules when they are first called on a GPU, so that
`import fastrcnn` needs no Triton. An upstream package has the same import name; this one ships only with fastrcnn.
"""
