"""MoETuner's two integer programmes (arXiv 2502.06643): their models, starts and bounds. The method is in `solvers`."""
