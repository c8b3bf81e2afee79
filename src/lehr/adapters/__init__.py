"""Models and kernels of other libraries, one file a library, which imports it when the file itself is imported."""
