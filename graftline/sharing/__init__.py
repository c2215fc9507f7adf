"""One artifact store for several machines, in an object store."""
