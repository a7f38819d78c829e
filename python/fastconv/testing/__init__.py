"""Problems, tolerances, buffers and timing: shared by tests/, bench/ and anybody who writes a kernel."""
