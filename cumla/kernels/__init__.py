"""The launch side of the kernels in kernels_cu: for each, its template arguments, its geometry and
the order of its arguments. Nothing here knows which device runs them."""
