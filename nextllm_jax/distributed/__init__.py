"""Multi-process training: rendezvous, messages between processes, and signals."""
