"""Distillation onto targets that a teacher wrote down once: Lightning OPD (arXiv 2604.13010) re-derived for video.

What carries over from language models is the regression onto the teacher at states that the student visits: for a
sampler with Gaussian transitions the expected gradient of the reverse divergence is that of the squared distance of the
two means there. What does not carry over is a stored score of distribution matching (DMD): it belongs to a sample that
the next update has moved, and a video student has no likelihood to weigh it with; that stage stays online.
"""
