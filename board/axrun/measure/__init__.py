"""How fast and how right a bundle is: bench, eval, and the latency of one axmodel."""
