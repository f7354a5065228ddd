"""The actions of `nf4kernels recover`, each as a function."""
