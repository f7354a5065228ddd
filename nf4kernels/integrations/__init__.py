"""What plugs nf4kernels into other libraries: one file a library, which must be installed. Nothing imports these."""
