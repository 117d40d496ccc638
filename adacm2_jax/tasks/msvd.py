"""MSVD (Chen and Dolan, ACL 2011), questions by Xu et al. (ACM MM 2017).

One-word answers, and captions. As MA-LMM scores answers: the first word of the best beam must be
the answer.
"""

from adacm2_jax.tasks.ma_lmm import words_and_captions

TASKS = words_and_captions("msvd")
