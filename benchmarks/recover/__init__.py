"""Every way of nf4kernels.recover on one model, two texts and the same bytes: rows, measured once and kept."""
