"""Published benchmarks: sampled once into a file that resumes, graded at any time, compared problem by problem."""
